"""Order and cursor: every row once per epoch, the same at any number of workers, from any position on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.data.cursor import Cursor
from simla_ray.data.order import Order, Position, Share
from simla_ray.errors import UserError

orders = st.builds(
    Order,
    unit_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
    lanes=st.integers(1, 5),
    window=st.integers(1, 60),
    seed=st.integers(0, 3),
)


@st.composite
def mixtures(draw):
    """Orders over up to three sources, each with a weight that plans at least one sample."""
    unit_rows, shares = [], []
    for _ in range(draw(st.integers(1, 3))):
        own = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
        weight = draw(st.sampled_from([0.3, 0.5, 1.0, 1.25, 2.0, 3.4]))
        shares.append(Share(len(unit_rows), len(unit_rows) + len(own), max(weight, 1 / sum(own))))
        unit_rows += own
    return Order(tuple(unit_rows), draw(st.integers(1, 4)), draw(st.integers(1, 60)), 0, tuple(shares))


def epoch_of(order: Order, lane: int, epoch: int) -> list[int]:
    windows = itertools.takewhile(lambda w: w.epoch == epoch, order.windows(lane, Position(epoch)))
    if order.lane_rows(lane) == 0:
        return []
    return [int(o) for w in windows for o in order.ordinals(w)]


@settings(max_examples=60, deadline=None)
@given(orders.filter(lambda o: o.rows >= o.lanes), st.integers(0, 3))
def test_an_epoch_holds_every_ordinal_once(order, epoch):
    lanes = [epoch_of(order, lane, epoch) for lane in range(order.lanes)]
    assert sorted(itertools.chain(*lanes)) == list(range(order.rows))
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


@settings(max_examples=60, deadline=None)
@given(mixtures().filter(lambda o: o.rows >= o.lanes))
def test_a_mixture_plans_each_sample_exactly_once(order):
    every, ends = sum(order.unit_rows), np.cumsum(order.unit_rows)
    seen = np.zeros(every, dtype=int)
    for epoch in range(8):
        lanes = [epoch_of(order, lane, epoch) for lane in range(order.lanes)]
        planned = list(itertools.chain(*lanes))
        assert len(planned) == len(set(planned)) == order.rows
        times = np.bincount(np.array(planned) % every, minlength=every)
        for share in order.shares:
            own = slice(ends[share.first - 1] if share.first else 0, ends[share.last - 1])
            rows, k = times[own], round(share.weight * len(times[own]))
            assert rows.sum() == k
            assert set(rows.tolist()) <= {k // len(rows), -(-k // len(rows))}  # as evenly as it goes
        # The second time a row comes in an epoch has a number of its own.
        assert all(
            (np.array(planned) == row + time * every).any() for row in range(every) for time in range(times[row])
        )
        seen += times
        for share in order.shares:
            own = slice(ends[share.first - 1] if share.first else 0, ends[share.last - 1])
            assert np.ptp(seen[own]) <= 1  # and over epochs all rows have their turn


@settings(max_examples=40, deadline=None)
@given((orders | mixtures()).filter(lambda o: o.rows >= o.lanes), st.data())
def test_going_on_from_any_position_gives_the_rest(order, data):
    lane = data.draw(st.integers(0, order.lanes - 1))
    offset = data.draw(st.integers(0, order.lane_rows(lane)))
    whole = epoch_of(order, lane, 0) + epoch_of(order, lane, 1)
    windows = order.windows(lane, Position(0, offset))
    rest: list[int] = []
    while len(rest) < len(whole) - offset:
        rest += order.ordinals(next(windows)).tolist()
    assert rest == whole[offset:]


def test_epochs_and_seeds_differ_and_repeat():
    order = Order((16,) * 6, 2, 32, seed=0)
    assert epoch_of(order, 0, 0) == epoch_of(Order((16,) * 6, 2, 32, seed=0), 0, 0)
    assert epoch_of(order, 0, 0) != epoch_of(order, 0, 1)
    assert epoch_of(order, 0, 0) != epoch_of(Order((16,) * 6, 2, 32, seed=1), 0, 0)


def test_rows_of_a_window_come_from_few_units():
    order = Order((100,) * 50, 1, 200, seed=0)
    window = next(order.windows(0, Position()))
    assert len(np.unique(order.ordinals(window) // 100)) == 2


def test_a_set_of_one_window_is_shuffled_before_it_is_dealt():
    order = Order((100,), 2, 100, seed=0)
    assert set(epoch_of(order, 0, 0)) != set(epoch_of(order, 0, 1))


def test_steps_cover_the_epochs():
    order = Order((10, 11), 2, 8, seed=0)
    assert order.steps(1, 4) == 3  # the longer lane has 11 rows
    assert order.steps(2, 4) == 6


def test_cursor_moves_forward_only_and_survives_json():
    cursor = Cursor.start(2).moved([(1, Position(0, 5)), (1, Position(1, 2))])
    assert cursor.positions == (Position(0, 0), Position(1, 2))
    assert Cursor.from_json(cursor.to_json(), 2) == cursor
    assert cursor.epochs([10, 10]) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="back"):
        cursor.moved([(1, Position(0, 9))])
    with pytest.raises(UserError, match="2 lanes, this run 3"):
        Cursor.from_json(cursor.to_json(), 3)

"""Order and cursor: every row once per epoch, the same at any number of workers, from any position on."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.data.cursor import Cursor
from simla_ray.data.order import Deal, Order, Position, Share

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
    windows = itertools.takewhile(lambda w: w.epoch == epoch, order.windows(lane, Position(epoch), {}))
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
    start, stop = order.deal(0, {}).slice(lane, order.lanes)
    offset = data.draw(st.integers(0, stop - start))
    whole = epoch_of(order, lane, 0) + epoch_of(order, lane, 1)
    windows = order.windows(lane, Position(0, offset), {})
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
    window = next(order.windows(0, Position(), {}))
    assert len(np.unique(order.ordinals(window) // 100)) == 2


def test_a_set_of_one_window_is_shuffled_before_it_is_dealt():
    order = Order((100,), 2, 100, seed=0)
    assert set(epoch_of(order, 0, 0)) != set(epoch_of(order, 0, 1))


def test_steps_cover_the_epochs():
    order = Order((10, 11), 2, 8, seed=0)
    start = Cursor.start(2)
    assert order.steps(start, 1, 4) == 3  # the longer lane has 11 rows
    assert order.steps(start, 2, 4) == 6
    assert order.steps(start, 1.5, 4) == 5  # 17 rows
    moved = start.moved([(0, Position(0, 10)), (1, Position(1, 1))])
    assert order.steps(moved, 2, 4) == 3  # ten rows in both
    assert order.steps(moved, 1, 4) == 0


def test_cursor_moves_forward_only_and_survives_json():
    order = Order((20,), 2, 8, seed=0)
    cursor = Cursor.start(2).moved([(1, Position(0, 5)), (1, Position(1, 2))])
    assert cursor.positions == (Position(0, 0), Position(1, 2))
    assert Cursor.from_json(json.loads(json.dumps(cursor.to_json()))) == cursor
    assert cursor.epochs(order) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="back"):
        cursor.moved([(1, Position(0, 9))])


def walk(order: Order, cursor: Cursor, steps: list[int], seen: dict[int, list[int]]) -> Cursor:
    """Lane m takes ``steps[m]`` rows; they are noted by epoch."""
    for lane, n in enumerate(steps):
        windows = order.windows(lane, cursor.positions[lane], cursor.deals)
        while n:
            window = next(windows)
            taken = order.ordinals(window)[:n]
            seen.setdefault(window.epoch, []).extend(taken.tolist())
            cursor = cursor.moved([(lane, Position(window.epoch, window.start + len(taken)))])
            n -= len(taken)
    return cursor


@settings(max_examples=80, deadline=None)
@given((orders | mixtures()).filter(lambda o: o.rows >= 5), st.data())
def test_exactly_once_whatever_the_number_of_lanes_in_each_leg(order, data):
    """Legs with other numbers of lanes, stopped anywhere, lanes apart: every planned sample once an epoch."""
    cursor, seen = Cursor.start(order.lanes), {}
    for _ in range(data.draw(st.integers(1, 5))):
        order = replace(order, lanes=data.draw(st.integers(1, 5)))
        cursor = cursor.dealt_to(order)
        at_least = data.draw(st.integers(0, order.rows))
        steps = [at_least + data.draw(st.integers(0, 3)) for _ in range(order.lanes)]
        cursor = walk(order, cursor, steps, seen)
        cursor = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
        assert cursor.epochs(order) * order.rows == pytest.approx(sum(map(len, seen.values())))
    last = max([*(p.epoch for p in cursor.positions), *cursor.deals])
    for lane, at in enumerate(cursor.positions):  # every lane to the end of the last epoch
        rows = 0
        for epoch in range(at.epoch, last + 1):
            start, stop = order.deal(epoch, cursor.deals).slice(lane, order.lanes)
            rows += stop - start - (at.offset if epoch == at.epoch else 0)
        cursor = walk(order, cursor, [rows if m == lane else 0 for m in range(order.lanes)], seen)
    every = sum(order.unit_rows)
    for epoch, ordinals in seen.items():
        assert len(set(ordinals)) == len(ordinals) == order.rows, epoch
        if not order.shares:
            assert sorted(ordinals) == list(range(every))


def test_a_cursor_for_the_same_lanes_stays_and_a_finished_epoch_is_forgotten():
    order = Order((10,) * 10, 2, 16, seed=0)
    cursor = Cursor.start(2).moved([(0, Position(0, 30)), (1, Position(0, 20))])
    assert cursor.dealt_to(order) is cursor
    four = cursor.dealt_to(replace(order, lanes=4))
    assert four.positions == (Position(0, 0),) * 4
    assert four.deals == {0: Deal(2, ((30, 20), (70, 30)))}
    assert four.epochs(replace(order, lanes=4)) == pytest.approx(0.5)
    assert four.moved([(m, Position(1, 1)) for m in range(4)]).deals == {}


def test_the_ledger_of_four_million_samples_is_small():
    """Also in the worst case: lanes far apart, and their number changed again and again within an epoch."""
    order = Order((1000,) * 4000, 64, 4096, seed=0)
    rng, cursor = np.random.default_rng(0), Cursor.start(64)
    for lanes in (64, 48, 96, 64, 128):
        order = replace(order, lanes=lanes)
        cursor = cursor.dealt_to(order)
        moves = []
        for lane in range(lanes):
            start, stop = order.deal(0, cursor.deals).slice(lane, lanes)
            moves.append((lane, Position(0, int((stop - start) * rng.uniform(0.05, 0.15)))))
        cursor = cursor.moved(moves)
    assert len(json.dumps(cursor.to_json())) < 20_000

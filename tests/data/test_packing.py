"""A stream of samples with lanes interleaved and rows dropped -> full micro-batches with exact positions."""

from collections import Counter

import numpy as np
import pytest

from simla_ray.config.load import load_run
from simla_ray.data.decode import DropRow
from simla_ray.data.index import build_index
from simla_ray.data.order import Order, Position
from simla_ray.data.packing import pack
from simla_ray.data.pipeline import WindowReader, order_of, worker_lanes
from simla_ray.data.sample import SampleMaker
from simla_ray.errors import UserError

RUN = load_run(overrides=["batch.micro=8", "batch.global=16", "data.shuffle_window=24", "data.max_drop_fraction=0.5"])


def blocks(reader: WindowReader, order: Order, lanes, windows: int):
    streams = [order.windows(lane, Position()) for lane in lanes]
    for _ in range(windows):
        for stream in streams:
            w = next(stream)
            yield from reader({n: np.array([getattr(w, n)]) for n in ("lane", "epoch", "start", "stop")})


@pytest.fixture
def reader(world_index, vocabulary):
    return WindowReader(RUN, world_index, order_of(RUN, world_index), vocabulary)


@pytest.mark.parametrize("workers", [1, 2])
def test_micro_batches_do_not_depend_on_the_number_of_workers(reader, world_index, workers):
    order = order_of(RUN, world_index)
    seen = {}
    for rank in range(workers):
        lanes = worker_lanes(RUN.micro_batches, workers, rank)
        for packed in pack(blocks(reader, order, lanes, 4), lanes, RUN, 96):
            seen.setdefault(packed.lane, []).append(packed.batch.uid)
    expected = {}
    for lane in range(RUN.micro_batches):
        stream = (int(o) for w in _take(order.windows(lane, Position()), 4) for o in order.ordinals(w))
        uids = [f"world-train-{o:06d}" for o in stream]
        expected[lane] = [uids[i : i + 8] for i in range(0, len(uids) - 7, 8)]
    for lane, batches in expected.items():
        assert seen[lane] == batches[: len(seen[lane])]
        assert len(seen[lane]) >= len(batches) - 1


def test_a_mixture_is_trained_exactly_once_as_planned(world_files, vocabulary):
    """One source one and a half times, another half: every planned sample once an epoch."""
    files = [str(world_files / f"{name}.parquet") for name in ("train", "val")]
    run = load_run(
        overrides={
            "data.train": files,
            "data.val": files,
            "data.weights": [1.5, 0.5],
            "batch.micro": 4,
            "batch.global": 8,
            "data.shuffle_window": 24,
        }
    )
    index = build_index(files, None, [], "data.train")
    order, reader = order_of(run, index), WindowReader(run, index, order_of(run, index), vocabulary)
    sizes = [sum(len(u) for u in index.units if name in u.path) for name in ("train", "val")]
    seen = {}
    for lane in range(2):
        stream = blocks(reader, order, [lane], 3 * -(-order.lane_rows(lane) // 24))
        for packed in pack(stream, [lane], run, len(index)):
            for uid, epoch in zip(packed.batch.uid, packed.batch.epoch, strict=True):
                seen.setdefault(epoch, []).append(uid)
    for epoch in (0, 1):
        counts = Counter(seen[epoch])
        for name, size, weight in zip(("train", "val"), sizes, (1.5, 0.5), strict=True):
            own = [n for uid, n in counts.items() if f"-{name}-" in uid]
            assert sum(own) == round(weight * size)
            assert set(own) <= ({1, 2} if name == "train" else {1})
            assert name == "val" or len(own) == size


def test_a_row_that_comes_again_in_an_epoch_is_drawn_anew(world_rows, vocabulary):
    make, row = SampleMaker(RUN, vocabulary, training=True), world_rows["train"][0]
    first, same, again = make(row, 3), make(row, 3, 0), make(row, 3, 1)
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not all(np.array_equal(first[name], again[name]) for name in first)


def test_dropped_rows_are_packed_over_and_named(reader, world_index, monkeypatch):
    make = SampleMaker.__call__

    def failing(self, row, epoch, time=0):
        if row["uid"].endswith(("3", "7")):
            raise DropRow("image_unreadable")
        return make(self, row, epoch)

    monkeypatch.setattr(SampleMaker, "__call__", failing)
    order = order_of(RUN, world_index)
    packs = list(pack(blocks(reader, order, [0], 4), [0], RUN, 96))
    assert all(len(p.batch.uid) == 8 for p in packs)
    used = [u for p in packs for u in p.batch.uid]
    dropped = [d.uid for p in packs for d in p.dropped]
    assert dropped
    assert all(d.endswith(("3", "7")) for d in dropped)
    assert not any(u.endswith(("3", "7")) for u in used)
    passed = packs[-1].position.epoch * order.lane_rows(0) + packs[-1].position.offset
    assert passed == len(used) + len(dropped)


def test_too_many_dropped_rows_stop_at_once(reader, world_index, monkeypatch):
    def failing(self, row, epoch, time=0):
        if row["uid"]:
            raise DropRow("image_unreadable")
        return blank(self, row, epoch)

    blank = SampleMaker.__call__
    monkeypatch.setattr(SampleMaker, "__call__", failing)
    stream = blocks(reader, order_of(RUN, world_index), [0], 4)
    with pytest.raises(UserError, match=r"max_drop_fraction: 49 of 96 .*image_unreadable 49; first world-train"):
        list(pack(stream, [0], RUN, 96))


def test_a_block_of_dropped_rows_only_keeps_the_shapes(reader, world_index, monkeypatch):
    make = SampleMaker.__call__

    def failing(self, row, epoch, time=0):
        if row["uid"]:
            raise DropRow("caption_empty")
        return make(self, row, epoch)

    monkeypatch.setattr(SampleMaker, "__call__", failing)
    block = next(iter(blocks(reader, order_of(RUN, world_index), [0], 1)))
    assert set(block["drop"]) == {"caption_empty"}
    assert block["image"].shape[1:] == (3, 48, 48)
    assert not block["image"].any()


def _take(iterator, n):
    return [next(iterator) for _ in range(n)]

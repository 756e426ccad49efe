"""A stream of samples with lanes interleaved and rows dropped -> full micro-batches with exact positions."""

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.config.load import load_run
from simla_ray.data import map_functions, world
from simla_ray.data.blocks import table_block, table_rows
from simla_ray.data.decode import DropRow
from simla_ray.data.index import build_index
from simla_ray.data.map_functions import NONE, BlockMaker, WindowReader
from simla_ray.data.order import Position
from simla_ray.data.packing import pack
from simla_ray.data.pipeline import order_of, rounds_of, worker_lanes
from simla_ray.data.sample import SampleMaker
from simla_ray.data.sources import parquet
from simla_ray.errors import UserError

RUN = load_run(overrides=["batch.micro=8", "batch.global=16", "data.shuffle_window=24", "data.max_drop_fraction=0.5"])


class Reader:
    """Both stages of the stream, without Ray."""

    def __init__(self, run, index, vocabulary, repeated=NONE):
        self.order, self.make = order_of(run, index), BlockMaker(run, vocabulary)
        self.read = WindowReader(index, self.order, repeated).read

    def __call__(self, lanes, windows: int):
        taken = [w for lane in lanes for w in _take(self.order.windows(lane, Position(), {}), windows)]
        for together in rounds_of(taken, self.order.window):
            for encoded in self.read(together):
                for block in self.make(encoded):
                    yield table_block(block)


@pytest.fixture
def reader(world_index, vocabulary):
    return Reader(RUN, world_index, vocabulary)


@pytest.mark.parametrize("workers", [1, 2])
def test_micro_batches_do_not_depend_on_the_number_of_workers(reader, world_index, workers):
    order = order_of(RUN, world_index)
    seen = {}
    for rank in range(workers):
        lanes = worker_lanes(RUN.micro_batches, workers, rank)
        for packed in pack(reader(lanes, 4), lanes, RUN, 96):
            seen.setdefault(packed.lane, []).append(packed.batch.uid)
    expected = {}
    for lane in range(RUN.micro_batches):
        stream = (int(o) for w in _take(order.windows(lane, Position(), {}), 4) for o in order.ordinals(w))
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
    reader = Reader(run, index, vocabulary)
    sizes = [sum(len(u) for u in index.units if name in u.path) for name in ("train", "val")]
    seen = {}
    for lane in range(2):
        stream = reader([lane], 3 * -(-reader.order.rows // 2 // 24))
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


def test_a_row_with_the_uid_of_an_earlier_one_is_dropped(world_index, vocabulary):
    seen = {}
    for block in Reader(RUN, world_index, vocabulary, np.array([5, 30]))([0, 1], 2):
        seen |= dict(zip(block["uid"].tolist(), block["drop"].tolist(), strict=True))
    assert {uid: reason for uid, reason in seen.items() if reason} == {
        "world-train-000005": "uid_duplicate",
        "world-train-000030": "uid_duplicate",
    }
    assert len(seen) == 96


def test_lanes_of_a_worker_take_turns(world_index, vocabulary, monkeypatch):
    """No lane's rows pile up while another waits; also where drops have moved the lanes apart."""
    monkeypatch.setattr(map_functions, "BLOCK_ROWS", 4)
    order = order_of(RUN, world_index)
    for starts in ((0, 0), (22, 26), (0, 24)):
        windows = [w for lane in (0, 1) for w in _take(order.windows(lane, Position(0, starts[lane]), {}), 4)]
        passed = dict(enumerate(starts))
        for together in rounds_of(windows, order.window):
            for encoded in WindowReader(world_index, order).read(together):
                for row in table_rows(encoded):
                    assert row["epoch"] * 48 + row["offset"] == passed[row["lane"]]
                    passed[row["lane"]] += 1
                if min(passed.values()) >= max(starts) and max(passed.values()) <= 96:
                    assert abs(passed[0] - passed[1]) <= abs(starts[0] - starts[1]) + 4


def test_done_row_groups_are_not_opened_after_a_resume(tmp_path, world_rows, monkeypatch):
    """At 90 % of an epoch at most 15 % of its bytes are read to its end; the whole epoch reads each row group once."""
    rows = [dict(row, uid=f"u{i:04d}") for i in range(25) for row in world_rows["train"]]
    pq.write_table(pa.Table.from_pylist(rows, schema=world.SCHEMA), tmp_path / "train.parquet", row_group_size=20)
    index = build_index([str(tmp_path / "train.parquet")], None, [], "data.train")
    assert len(index.units) == 120
    run = load_run(overrides=["batch.micro=10", "batch.global=20", "data.shuffle_window=20"])
    order, opened = order_of(run, index), []
    whole = parquet._group

    def counted(path, number, columns):
        table = whole(path, number, columns)
        opened.append(table.nbytes)
        return table

    monkeypatch.setattr(parquet, "_group", counted)

    def bytes_of(at):
        opened.clear()
        windows = [
            w for lane in range(2) for w in itertools.takewhile(lambda w: w.epoch == 0, order.windows(lane, at, {}))
        ]
        for together in rounds_of(windows, order.window):
            list(WindowReader(index, order).read(together))
        return sum(opened)

    epoch = bytes_of(Position())
    assert len(opened) == 120
    assert bytes_of(Position(0, 1080)) <= 0.15 * epoch
    assert bytes_of(Position(0, 1085)) <= 0.15 * epoch  # in the middle of a row group


def test_dropped_rows_are_packed_over_and_named(reader, world_index, monkeypatch):
    make = SampleMaker.__call__

    def failing(self, row, epoch, time=0):
        if row["uid"].endswith(("3", "7")):
            raise DropRow("image_unreadable")
        return make(self, row, epoch)

    monkeypatch.setattr(SampleMaker, "__call__", failing)
    packs = list(pack(reader([0], 4), [0], RUN, 96))
    assert all(len(p.batch.uid) == 8 for p in packs)
    used = [u for p in packs for u in p.batch.uid]
    dropped = [d.uid for p in packs for d in p.dropped]
    assert dropped
    assert all(d.endswith(("3", "7")) for d in dropped)
    assert not any(u.endswith(("3", "7")) for u in used)
    passed = packs[-1].position.epoch * 48 + packs[-1].position.offset
    assert passed == len(used) + len(dropped)


def test_too_many_dropped_rows_stop_at_once(reader, world_index, monkeypatch):
    def failing(self, row, epoch, time=0):
        if row["uid"]:
            raise DropRow("image_unreadable")
        return blank(self, row, epoch)

    blank = SampleMaker.__call__
    monkeypatch.setattr(SampleMaker, "__call__", failing)
    stream = reader([0], 4)
    with pytest.raises(UserError, match=r"max_drop_fraction: 49 of 96 .*image_unreadable 49; first world-train"):
        list(pack(stream, [0], RUN, 96))


def test_a_block_of_dropped_rows_only_keeps_the_shapes(reader, world_index, monkeypatch):
    make = SampleMaker.__call__

    def failing(self, row, epoch, time=0):
        if row["uid"]:
            raise DropRow("caption_empty")
        return make(self, row, epoch)

    monkeypatch.setattr(SampleMaker, "__call__", failing)
    block = next(iter(reader([0], 1)))
    assert set(block["drop"]) == {"caption_empty"}
    assert block["image"].shape[1:] == (3, 48, 48)
    assert not block["image"].any()


def _take(iterator, n):
    return [next(iterator) for _ in range(n)]

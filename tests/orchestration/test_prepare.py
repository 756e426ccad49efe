"""Indexes of a run's data, of which ``data.fraction`` of the training rows is kept."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.config.load import load_run
from simla_ray.data import pipeline
from simla_ray.data.cursor import Cursor
from simla_ray.errors import UserError
from simla_ray.orchestration import prepare as prepare_module
from simla_ray.orchestration.plan import plan
from simla_ray.orchestration.prepare import Prepared, build_indexes


def load(world_files, *overrides):
    sets = [f"data.{name}=[{world_files / name}.parquet]" for name in ("train", "val")]
    return load_run(overrides=[*sets, "batch.micro=4", "batch.global=8", "queue=0", *overrides])


def test_a_fraction_is_of_the_training_rows_alone(world_files, tmp_path, vocabulary):
    run = load(world_files, "data.fraction=0.125")
    indexes = build_indexes(run)
    assert {name: len(index) for name, index in indexes.items()} == {"train": 12, "val": 48, "test": 48}
    described = Prepared(tmp_path, indexes, vocabulary).describe(run)
    assert described["train"] | {"uris": None, "fingerprint": None} == {
        "uris": None, "split": None, "rows": 12, "left_out": 84, "fraction": 0.125, "fingerprint": None,
    }  # fmt: skip
    assert "fraction" not in described["val"]
    order = pipeline.order_of(run, indexes["train"])
    lines = plan(run, order, 6, indexes["train"].left_out)
    assert lines[0] == "rows       12 of 96, data.fraction=0.125"
    assert any("6 = 48 pairs = 4.0 epochs of 12 rows" in line for line in lines)
    assert not plan(load(world_files), order, 6)[0].startswith("rows")


def test_every_seed_and_batch_trains_on_the_same_rows(world_files):
    kept = [
        build_indexes(load(world_files, "data.fraction=0.5", *more))["train"].units
        for more in ([], ["seed=7"], ["batch.global=16", "ray.workers=2", "data.decode_cpus=2"])
    ]
    assert kept[0] == kept[1] == kept[2]


def test_an_epoch_of_a_mixture_counts_the_rows_of_each_share(world_files):
    train = world_files / "train.parquet"
    run = load(
        world_files, f"data.train=[{train}, {world_files / 'test'}.parquet]", "data.weights=[2, 0.5]",
        "data.fraction=0.25",
    )  # fmt: skip
    order = pipeline.order_of(run, build_indexes(run)["train"])
    assert [order.planned(share) for share in order.shares] == [2 * 24, 6]
    assert order.steps(Cursor.start(order.lanes), 1, run.batch.micro) == 7  # 54 rows in two lanes of 4


def test_a_share_that_is_too_small_is_said(world_files):
    with pytest.raises(
        UserError, match=r"data\.train: 5 rows .*batch\.global=8\), 91 left out by data\.fraction=0\.05"
    ):
        build_indexes(load(world_files, "data.fraction=0.05"))
    with pytest.raises(UserError, match=r"data\.fraction: 0\.005 of the rows of .*train\.parquet is less than one"):
        build_indexes(load(world_files, "data.fraction=0.005"))


def without(path, folder, *columns, captions=None):
    """The rows of a file without some columns, and with so many captions each."""
    table = pq.read_table(path).drop_columns(list(columns))
    if captions is not None:
        cut = pa.array([each[:captions] for each in table["captions"].to_pylist()])
        table = table.set_column(table.column_names.index("captions"), "captions", cut)
    pq.write_table(table, folder / "val.parquet")
    return f"data.val=[{folder / 'val'}.parquet]"


def test_keyword_quality_needs_something_to_be_measured_against(world_files, tmp_path):
    best = "eval.best=keyword_ap"
    build_indexes(load(world_files, best))
    train = world_files / "train.parquet"
    build_indexes(load(world_files, best, without(train, tmp_path, "keywords", "claims")))  # other captions tell
    bare = without(train, tmp_path, "keywords", "claims", captions=1)
    with pytest.raises(UserError, match=r"eval\.best: keyword_ap needs the column keywords, .* the first 96 rows"):
        build_indexes(load(world_files, best, bare))
    build_indexes(load(world_files, bare))


def test_runs_share_what_does_not_depend_on_their_differences():
    """Trials of a sweep are evaluated on the validation set, its repeats on the test set."""
    train = SimpleNamespace(fingerprint=lambda: "rows")

    def key(*overrides):
        return prepare_module._key(load_run(overrides=list(overrides)), train)

    trial = ("data.test=[world:val]", "data.decode_cpus=3", "objectives.psl.weight=3", "optim.lr=0.1")
    assert key(*trial) == key()
    for other in ("data.fraction=0.5", "data.max_pixels=1000000", "seed=1", "text.max_words=10", "codes.n=64"):
        assert key(other) != key(), other

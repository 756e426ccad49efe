"""Validation while training: keyword quality where it picks the best checkpoint, equal for any number of workers."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.index import build_index
from simla_ray.errors import UserError
from simla_ray.evaluation import keywords
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.work import Work
from simla_ray.models.model import Model
from simla_ray.orchestration.prepare import Prepared
from simla_ray.orchestration.validation import Validation
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses
from tests.evaluation.conftest import on_ranks

CPU = torch.device("cpu")


def load(*overrides):
    return load_run(overrides=["size=tiny", "objectives.mim=null", "batch.micro=8", "batch.global=16", *overrides])


def losses_of(run, vocabulary):
    torch.manual_seed(0)
    return Losses(run, Model(run, len(vocabulary)), None, vocabulary.cls_id, None)


def validation(run, val, vocabulary, folder, comm=None):
    return Validation(run, Prepared(folder, {"val": val}, vocabulary), losses_of(run, vocabulary), comm or Comm(), CPU)


@pytest.fixture
def val(world_files):
    return build_index([str(world_files / "val.parquet")], None, [], "data.val")


def test_keyword_quality_is_that_of_the_evaluation(val, vocabulary, tmp_path, world_rows):
    run = load("eval.best=keyword_ap")
    measured = validation(run, val, vocabulary, tmp_path)
    first, again = measured(), measured()
    assert first == again
    expected = keywords.measure(EvalSet.load(measured.scorer, world_rows["val"], Work())).metrics["ap"]
    assert first["keyword_ap"] == expected and "retrieval_r10" in first
    assert measured.losses.training


def test_it_is_measured_only_where_it_picks_the_best_checkpoint(val, vocabulary, tmp_path):
    assert "keyword_ap" not in validation(load(), val, vocabulary, tmp_path)()


def test_a_run_without_contrast(val, vocabulary, tmp_path):
    run = load("eval.best=keyword_ap", "objectives.itc=null", "schedule.kind=joint", "schedule.phases=[]")
    metrics = validation(run, val, vocabulary, tmp_path)()
    assert 0 < metrics["keyword_ap"] <= 1 and "retrieval_r10" not in metrics


def test_rows_without_truth_are_said_before_the_first_step(world_rows, vocabulary, tmp_path):
    rows = [
        {name: row[name] for name in ("uid", "image")} | {"caption": row["captions"][0]} for row in world_rows["val"]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bare.parquet")
    bare = build_index([str(tmp_path / "bare.parquet")], None, [], "data.val")
    with pytest.raises(
        UserError, match=r"eval\.best: keyword_ap .*data\.val: no column keywords and no second caption"
    ):
        validation(load("eval.best=keyword_ap"), bare, vocabulary, tmp_path)
    assert validation(load(), bare, vocabulary, tmp_path)()


class Ranks(Comm):
    """A worker among threads; sums come in the order of the ranks."""

    def __init__(self, rank, world, share):
        self.rank, self.world, self.share = rank, world, share

    def gather(self, value):
        return self.share(value)

    def sum(self, tensor):
        return torch.stack(self.share(tensor)).sum(0)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_gives_the_same_quality(val, vocabulary, tmp_path, world):
    run = load("eval.best=keyword_ap")
    alone = validation(run, val, vocabulary, tmp_path)()
    built = [losses_of(run, vocabulary) for _ in range(world)]

    def on_rank(rank, gather):
        prepared = Prepared(tmp_path, {"val": val}, vocabulary)
        return Validation(run, prepared, built[rank], Ranks(rank, world, gather), CPU)()

    for found in on_ranks(world, on_rank):  # threads share torch's random state, from which ITM draws
        assert [found[name] for name in ("keyword_ap", "retrieval_r10")] == [
            alone["keyword_ap"],
            alone["retrieval_r10"],
        ]
        assert found.keys() == alone.keys()

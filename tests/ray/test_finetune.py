"""Fine-tuning through Ray: a trained run and a task give a run like any other, on any number of workers."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.config.load import load_finetuning, load_run
from simla_ray.data import world
from simla_ray.data.world_questions import questions_of
from simla_ray.jsonl import read_lines
from simla_ray.orchestration.cli import evaluate_main
from simla_ray.orchestration.finetune import finetune_main
from simla_ray.orchestration.preflight import check
from simla_ray.orchestration.start import describe
from tests.ray.alone import losses_alone, losses_of
from tests.release.conftest import make_run_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHAPE = {
    "vision__width": 32, "text__width": 32, "text__ffn": 64, "joint_width": 16, "codes__n": 16, "eval__pairs": 24,
    "batch__micro": 8, "batch__global": 16, "ray__workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scenes with questions and statements, one row with neither; the pictures of some in pairs."""
    folder = tmp_path_factory.mktemp("data")
    for split, n in (("train", 96), ("val", 32)):
        rows = [world.make_row(0, split, i, 48, 1) for i in range(n)]
        rows = [row | questions_of(0, split, i, json.loads(row["scene"]), 4) for i, row in enumerate(rows)]
        pairs = [
            {"uid": f"p-{i}", "images": [a["image"], b["image"]], "statements": a["statements"]}
            for i, (a, b) in enumerate(itertools.pairwise(rows))
        ]
        rows[3] = rows[3] | {"qas": [{"question": "?", "answers": []}], "statements": []}
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet", row_group_size=16)
        pq.write_table(pa.Table.from_pylist(pairs), folder / f"pairs-{split}.parquet", row_group_size=16)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, vocabulary):
    return make_run_folder(tmp_path_factory.mktemp("runs") / "start", vocabulary, **SHAPE)[0]


def settings(data, files=""):
    """Of 8 steps."""
    return [
        f"data.train=[{data}/{files}train.parquet]", f"data.val=[{data}/{files}val.parquet]", "optim.max_steps=8",
        "checkpoint.every_steps=4", "eval.every_steps=4", "eval.batches=2", "log.every_steps=2", "ray.device=cpu",
        "data.audit=true", "batch.micro=8", "batch.global=16", "optim.warmup_steps=2", "text.dropout=0.1",
        "eval.pairs=24",
    ]  # fmt: skip


def tuned(start, data, name, *words, files=""):
    """Summary and folder of a run."""
    storage = start.parent
    words = (str(start), *words, "--name", name, "--storage", str(storage), *settings(data, files))
    assert finetune_main(words) == 0
    return json.loads((storage / name / "summary.json").read_text()), storage / name


def alone(start, data, folder, *words):
    """Losses with one worker in this process, and what is said of the start."""
    given = [f"init_from={start}", *words, *settings(data), "ray.workers=1"]
    run, _ = check(load_finetuning(load_run([start / "config.yaml"], presets=False), [], given))
    return losses_alone(run, folder / "prepared", folder / "log"), describe(run)["notes"]


@pytest.fixture(scope="module")
def answering(ray_session, start, data):
    """A run that has learnt to answer questions, with two workers."""
    return tuned(start, data, "vqa", "task=vqa", "ray.workers=2", "data.decode_cpus=2")


def test_questions_on_one_worker_and_on_two(answering, start, data, capsys, tmp_path):
    summary, one = answering
    expected, notes = alone(start, data, tmp_path, "task=vqa")
    assert not any("text.cls" in note for note in notes)  # the decoder has taken it
    for ours, theirs in zip(losses_of(one), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    found = summary["eval"]["vqa"]
    assert summary["label"] == "simla-tiny-vqa" and found["n"] == 4 * 23
    assert {"accuracy", "majority", "majority_of_type", "text_only", "types", "known"} <= set(found)
    assert summary["dropped"] == {"qas_empty": 1}
    validated = [line["metrics"] for line in read_lines(one / "metrics.jsonl") if line["kind"] == "val"]
    assert all(0 <= m["answers_accuracy"] <= 1 and m["answers_hard"] > 0 for m in validated)
    assert "Answers to questions" in (one / "report.html").read_text()
    capsys.readouterr()
    assert evaluate_main([str(one), "vqa", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vqa"]["accuracy"] == found["accuracy"]


def test_a_finished_task_is_a_start_itself(answering, data, tmp_path):
    """From the VQA run to VQA again, its decoder with it; and a classifier in its place."""
    _, first = answering
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    again, notes = alone(first, data, tmp_path / "again", "task=vqa")
    assert notes == [] and again[0]["answers"] < losses_of(first)[0]["answers"]
    head = "objectives.answers={head: classifier, most: 40}"
    classified, notes = alone(first, data, tmp_path / "other", "task=vqa", head)
    assert "answer_head starts anew: vqa has none" in notes
    assert "decoder of vqa is left out: this run has none" in notes
    assert 3 < classified[0]["answers"] < 4.5  # ln 40


def test_statements_about_one_picture_and_about_two(ray_session, start, data, tmp_path):
    one, _ = alone(start, data, tmp_path, "task=nlvr")
    assert len(one) == 8 and 0.4 < one[0]["labels"] < 1  # ln 2
    two, folder = tuned(start, data, "nlvr2", "task=nlvr2", files="pairs-")
    found = two["eval"]["statements"]
    assert found["chance"] == 0.5 and set(found["classes"]) == {"true", "false"}
    assert '"second_image"' in (folder / "evaluation.json").read_text()


def test_retrieval_goes_on_with_both_objectives(ray_session, start, data):
    summary, _ = tuned(start, data, "retrieval", "task=retrieval")
    assert set(summary["losses"]) == {"itc", "itm"}
    assert "itm" in summary["eval"]["retrieval"]

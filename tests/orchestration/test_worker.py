"""The end of a run: which weights are evaluated."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simla_ray.evaluation.paired import read_per_image
from simla_ray.jsonl import read_lines
from simla_ray.orchestration import worker
from simla_ray.report.terminal import event_line
from simla_ray.training.checkpoint import find_checkpoint, load_state
from simla_ray.training.comm import Comm
from simla_ray.training.log import RunLog
from simla_ray.types import EvalResult
from tests.release.conftest import make_run_folder


@pytest.fixture
def finished(tmp_path, vocabulary, monkeypatch):
    """A folder with steps 10, the best, and 20, and a call that evaluates nothing but says which weights it had."""
    folder, run = make_run_folder(tmp_path / "run", vocabulary)
    source = torch.nn.Linear(1, 1)
    seen = []
    monkeypatch.setattr(worker, "load_weights", lambda path, model: seen.append(path.name))
    monkeypatch.setattr(worker, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(worker, "Scorer", lambda *_: None)
    monkeypatch.setattr(worker.pipeline, "iterate_rows", lambda *_: [])
    prepared = SimpleNamespace(indexes={"test": None}, vocabulary=vocabulary, folder=folder / "prepared")
    losses = SimpleNamespace(model=source, tokenizer=None)

    def evaluated():
        state = load_state(find_checkpoint(folder / "checkpoints"))
        log = RunLog(folder, state.step)
        worker._evaluate_best(run, folder, prepared, losses, state, Comm(), torch.device("cpu"), log)
        log.close()
        return seen, json.loads((folder / "state.json").read_text())["best_step"]

    return folder, evaluated


def test_the_best_weights_are_evaluated(finished):
    _, evaluated = finished
    assert evaluated() == (["step-00000010"], 10)


def test_what_each_image_gave_is_kept_beside_the_evaluation(finished, monkeypatch):
    folder, evaluated = finished
    sums = np.array([[1, 2], [0, 3]], np.float32)
    results = {
        "data": EvalResult("data", {}, uids=("a", "b")),
        "words": EvalResult("words", {"color_right": 0.2}, per_image={"color_right": sums}),
    }
    monkeypatch.setattr(worker, "evaluate", lambda *_, **__: results)
    evaluated()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["words"] == {"metrics": {"color_right": 0.2}, "intervals": {}, "examples": []}
    (folder / "summary.json").write_text(json.dumps({"eval": {"words": evaluation["words"]["metrics"]}}))
    found = read_per_image(folder)
    assert found.metrics == {"words/color_right": 0.2} and found.uids == ("a", "b")
    assert (found.sums["words/color_right"] == sums).all()


def test_the_last_weights_are_evaluated_where_the_best_are_damaged(finished):
    folder, evaluated = finished
    with (folder / "checkpoints" / "step-00000010" / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    assert evaluated() == ([], 20)
    said = [line for event in read_lines(folder / "events.jsonl") if (line := event_line(event))]
    assert said == ["warning    the best checkpoint, step 10, is damaged or gone; the last one is evaluated"]

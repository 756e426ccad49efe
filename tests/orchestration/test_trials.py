"""How many runs a cluster holds, what became of a trial, and that Tune's drivers tell what runs write."""

import json
import math
import threading

import pytest

from simla_ray.config.load import load_run
from simla_ray.errors import UserError
from simla_ray.orchestration import trials
from simla_ray.orchestration.cluster import Cluster
from simla_ray.orchestration.runs import run_folder
from simla_ray.orchestration.trials import (
    FAILED,
    FINISHED,
    STOPPED,
    TIMED_OUT,
    Follow,
    Outcome,
    at_a_time,
    fitting,
    outcome_of,
    task_of,
    train_trial,
)
from simla_ray.training.events import stopped

KEY = "sweep.concurrent"


def run_of(*overrides):
    return load_run(overrides=["ray.workers=2", "data.decode_cpus=2", *overrides])


def cluster(cpus, gpus=0.0, own=False):
    return Cluster(own, "10.0.0.1:6379", 1, cpus, gpus, None)


@pytest.mark.parametrize(
    ("cores", "overrides", "wanted", "runs"),
    [
        (2, [], None, 1),
        (8, [], None, 4),
        (1, [], None, 1),  # a Ray of our own gets the logical CPUs that one run asks for
        (2, ["ray.workers=1", "ray.cpus_per_worker=0.5"], None, 4),
        (2, [], 3, 3),
    ],
)
def test_runs_at_a_time_on_this_machine(cores, overrides, wanted, runs, monkeypatch):
    monkeypatch.setattr(trials.os, "cpu_count", lambda: cores)
    assert at_a_time(run_of(*overrides), wanted) == runs


@pytest.mark.parametrize(
    ("cpus", "gpus", "overrides", "wanted", "fit"),
    [
        (8.2, 0, [], None, 2),  # 2 workers, 2 to decode, 0.1 for the driver: 4.1 each
        (8.1, 0, [], None, 1),
        (8.2, 0, [], 1, 1),
        (64, 4, ["ray.device=gpu"], None, 2),
        (64, 5, ["ray.device=gpu"], 2, 2),
        (64, 4, ["ray.device=cpu"], None, 15),
        (3, 0, ["ray.cpus_per_worker=0.5"], None, 0),
        (3.1, 0, ["ray.cpus_per_worker=0.5"], None, 1),
    ],
)
def test_runs_at_a_time_in_a_cluster(cpus, gpus, overrides, wanted, fit):
    if fit:
        assert fitting(run_of(*overrides), cluster(cpus, gpus), wanted, KEY) == fit
    else:
        with pytest.raises(UserError):
            fitting(run_of(*overrides), cluster(cpus, gpus), wanted, KEY)


def test_a_ray_of_our_own_is_bound_by_the_cores(monkeypatch):
    monkeypatch.setattr(trials.os, "cpu_count", lambda: 4)
    assert fitting(run_of(), cluster(40, own=True), None, KEY) == 2
    assert fitting(run_of(), cluster(40, own=True), 5, KEY) == 5  # whoever asks for it shares the cores


@pytest.mark.parametrize(
    ("cpus", "gpus", "overrides", "wanted", "said"),
    [
        (
            4,
            0,
            [],
            None,
            "1 at a time, but one takes 4.1 CPUs (2 workers of 1, 2 to decode, a driver), and the cluster's 4",
        ),
        (
            9,
            0,
            [],
            3,
            "3 at a time, but one takes 4.1 CPUs (2 workers of 1, 2 to decode, a driver), and the cluster's 9",
        ),
        (64, 1, ["ray.device=gpu"], None, "and 2 GPUs, and the cluster's 64 CPUs and 1 GPUs have room for 0"),
        (64, 3, ["ray.device=gpu"], 2, "2 at a time, but one takes 4.1 CPUs"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(cpus, gpus, overrides, wanted, said):
    with pytest.raises(UserError) as caught:
        fitting(run_of(*overrides), cluster(cpus, gpus), wanted, KEY)
    assert str(caught.value).startswith(f"{KEY}: ") and said in str(caught.value) and "ray.workers" in str(caught.value)


def test_how_a_trial_ended():
    assert outcome_of(None) == Outcome(FAILED, "the process of its driver was lost")
    stopped = {"step": 40, "metrics": {"retrieval_r10": 0.2}, "retrieval_r10": 0.2, "done": True}
    assert outcome_of(stopped) == Outcome(STOPPED, None, 40, {"retrieval_r10": 0.2})
    late = {"step": 40, "metrics": {}, "status": TIMED_OUT, "reason": "not done after 9 s"}
    assert outcome_of(late) == Outcome(TIMED_OUT, "not done after 9 s", 40)
    done = {"step": 90, "metrics": {"a": 1.0}, "status": FINISHED, "summary": {"steps": 90}}
    assert outcome_of(done) == Outcome(FINISHED, None, 90, {"a": 1.0}, {"steps": 90})


class Trial:
    """What Tune knows of a trial."""

    def __init__(self, name, result=None):
        self.config, self.last_result = {"trial": {"run": {"name": name}, "steps": 8}}, result


def test_follow_tells_by_the_names_of_runs():
    told = []
    follow = Follow(
        lambda name: told.append(("started", name)),
        lambda name, result: told.append(("reported", name, result["step"])),
        lambda name, outcome: told.append((outcome.status, name)),
    )
    follow.on_trial_start(0, [], Trial("s/trials/a"))
    follow.on_trial_result(0, [], Trial("s/trials/a"), {"step": 4})
    follow.on_trial_result(0, [], Trial("s/trials/a"), {"step": 8, "status": FINISHED})  # the end is told once
    follow.on_trial_complete(0, [], Trial("s/trials/a", {"step": 8, "status": FINISHED}))
    follow.on_trial_error(0, [], Trial("s/trials/b"))
    assert told == [
        ("started", "s/trials/a"), ("reported", "s/trials/a", 4), ("finished", "s/trials/a"), ("failed", "s/trials/b"),
    ]  # fmt: skip
    assert follow.__getstate__() == {}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """``train_trial`` with a run that writes lines and then ends as it is told."""
    run = load_run(overrides=[f"storage={tmp_path}", "name=s/trials/trial-000"])
    reports = []
    monkeypatch.setattr(trials, "LOOK_S", 0.01)
    monkeypatch.setattr(trials.tune, "report", reports.append)

    def train(lines, end, timeout_s=None):
        def pretrain(run, say, within):
            say("hello")
            path = run_folder(run) / "metrics.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            return end()

        monkeypatch.setattr(trials, "pretrain", pretrain)
        train_trial({"trial": task_of(run, 12)}, within=None, timeout_s=timeout_s)
        assert (run_folder(run) / "output.txt").read_text() == "hello\n"
        return reports

    return train, run_folder(run)


def val(step, value):
    return {"step": step, "kind": "val", "metrics": {"retrieval_r10": value, "mlm_accuracy": 0.5}}


def test_a_trial_reports_its_validations_and_the_evaluated_one_last(trained):
    lines = [{"step": 2, "kind": "train", "losses": {}}, val(4, 0.2), val(8, 0.6), val(12, 0.3)]
    reports = trained[0](lines, lambda: {"steps": 12, "best_step": 8, "eval": {}})
    assert [r["step"] for r in reports] == [4, 8, 12]
    assert [r["retrieval_r10"] for r in reports] == [0.2, 0.6, 0.6]  # what the best checkpoint had
    assert ["status" in r for r in reports] == [False, False, True] and reports[-1]["summary"]["best_step"] == 8


def test_a_trial_that_is_not_finite_is_given_up_and_told_to_end(trained):
    train, folder = trained
    reports = train([val(4, 0.2), val(8, math.nan), val(12, 0.3)], lambda: {"steps": 12, "best_step": 12})
    assert [r["step"] for r in reports] == [4, 4]
    assert (reports[-1]["status"], reports[-1]["reason"]) == (FAILED, "not finite at step 8: retrieval_r10")
    assert stopped(folder) == reports[-1]["reason"]


def fails(error):
    raise error


def test_a_trial_that_crashes_says_why_and_keeps_where(trained):
    reports = trained[0]([val(4, 0.2)], lambda: fails(ValueError("boom")))
    assert (reports[-1]["status"], reports[-1]["reason"], reports[-1]["step"]) == (FAILED, "ValueError: boom", 4)
    assert "raise error" in (trained[1] / "failures.txt").read_text()


def test_a_mistake_in_a_trial_is_its_reason(trained):
    reports = trained[0]([], lambda: fails(UserError("data.train: nothing there")))
    assert [(r["status"], r["reason"], r["step"]) for r in reports] == [(FAILED, "data.train: nothing there", 0)]
    assert not (trained[1] / "failures.txt").exists()


def test_a_trial_that_takes_too_long_is_given_up(trained):
    forever = threading.Event()
    reports = trained[0]([val(4, 0.2)], lambda: forever.wait(5) and {}, timeout_s=0.3)
    assert (reports[-1]["status"], reports[-1]["reason"], reports[-1]["step"]) == (TIMED_OUT, "not done after 0.3 s", 4)
    forever.set()

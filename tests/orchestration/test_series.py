"""What sweeps and comparisons share: names, runs that have ended, what is said meanwhile."""

import json
from pathlib import Path

import numpy as np
import pytest

from simla_ray.config.load import load_run, to_yaml
from simla_ray.errors import UserError
from simla_ray.evaluation.paired import PerImage
from simla_ray.orchestration import series as series_module
from simla_ray.orchestration.launch import Within, locked
from simla_ray.orchestration.runs import check_same_run
from simla_ray.orchestration.series import Progress, Series, differences, fresh, summary_before, write_json
from simla_ray.orchestration.trials import FAILED, FINISHED, Outcome
from tests.orchestration.sweeps import write_run


def test_fresh_names(tmp_path):
    assert fresh(tmp_path, "sweep") == "sweep-001"
    for name in ("sweep-001", "sweep-007", "sweep-x", "comparison-009", "sweep-003-old"):
        (tmp_path / name).mkdir()
    assert fresh(tmp_path, "sweep") == "sweep-008" and fresh(tmp_path, "comparison") == "comparison-010"


def test_a_folder_holds_one_kind_of_thing(tmp_path):
    folder = tmp_path / "tuned"
    assert summary_before(folder, "sweep") is None
    folder.mkdir()
    write_json(folder / "summary.json", {"kind": "sweep"})
    (folder / "sweep.yaml").write_text("")
    assert summary_before(folder, "sweep") == {"kind": "sweep"}
    with pytest.raises(UserError, match=r"name: .*tuned holds a sweep, no comparison"):
        summary_before(folder, "comparison")
    with pytest.raises(UserError, match="holds a sweep, no run"):  # pretrain.py --name tuned
        check_same_run(load_run(overrides=[f"storage={tmp_path}", "name=tuned"]))
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="holds a run, no sweep"):
        summary_before(tmp_path / "trained", "sweep")


def test_one_command_at_a_time_in_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.fixture
def series(tmp_path):
    base = load_run(overrides=[f"storage={tmp_path}", "name=many"])
    return Series(tmp_path / "many", base, Within(None, tmp_path), 8, 100, 2, None, lambda line: None)


def runs_of(series, *names):
    tree = [f"storage={series.base.storage}"]
    return [(load_run(overrides=[*tree, f"name={series.name_of('runs', name)}"]), 8) for name in names]


def test_runs_that_have_ended_are_not_started_again(series, monkeypatch):
    started = []

    def run_trials(within, scratch, *, tasks, follow, **options):
        started.extend(task["run"]["name"] for task in tasks)
        assert scratch == series.folder / ".tune" and options["concurrent"] == 2
        for name, outcome in ((started[-1], Outcome(FAILED, "boom", 3)), (started[0], Outcome(FINISHED, step=8))):
            follow.started(name)
            follow.ended(name, outcome)

    monkeypatch.setattr(series_module, "run_trials", run_trials)
    write_run(series.folder / "runs" / "b", {"keywords": {"ap": 0.5}})
    said = []
    runs = runs_of(series, "c", "b", "a")
    ended = series.run_all(runs, Progress(said.append, "retrieval_r10", lambda name: ""))
    assert started == ["many/runs/c", "many/runs/a"]
    assert list(ended) == ["many/runs/c", "many/runs/b", "many/runs/a"]  # in the order asked for
    assert [o.status for o in ended.values()] == [FINISHED, FINISHED, FAILED]
    assert ended["many/runs/b"].summary["eval"] == {"keywords": {"ap": 0.5}}
    assert said[1].startswith("end        a  failed at step 3") and ": boom; 1 to go" in said[1]
    write_run(series.folder / "runs" / "a", {})
    write_run(series.folder / "runs" / "c", {})
    started.clear()
    series.run_all(runs, Progress(said.append, "retrieval_r10", lambda name: ""))
    assert started == []


@pytest.mark.parametrize("key", ["optim.max_steps=7", "batch.micro=16", "data.fraction=0.5"])
def test_a_run_of_another_config_is_not_taken_for_this_one(series, monkeypatch, key):
    monkeypatch.setattr(series_module, "run_trials", lambda *_, **__: pytest.fail("started"))
    run, other = (load_run(overrides=["name=many/a", f"storage={series.folder.parent}", *k]) for k in ([], [key]))
    write_run(series.folder / "a", {})
    (series.folder / "a" / "config.yaml").write_text(to_yaml(run))
    series.check_unchanged([(run.model_copy(update={"ray": other.ray}), 10)])
    with pytest.raises(UserError, match=f"holds runs of another config.*\na: {key.partition('=')[0]} ") as caught:
        series.run_all([(other, 10)], Progress(lambda line: None, "x", lambda name: ""))
    assert len(str(caught.value).splitlines()) == 2


def test_what_is_said_of_a_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(series_module.time, "monotonic", lambda: now[0])
    said = []
    progress = Progress(said.append, "retrieval_r10", lambda name: "weight=3")
    progress.expect(5, 2)
    progress.started("s/trials/trial-000")
    now[0] += 60
    progress.reported("s/trials/trial-000", {"step": 40, "metrics": {"retrieval_r10": 0.125}})
    now[0] += 60
    progress.ended("s/trials/trial-000", Outcome("timed_out", "not done\nin time", 40, {"mlm_accuracy": 0.5}))
    assert said[:2] == ["start      trial-000  weight=3", "step       trial-000  40  retrieval_r10 12.5 %"]
    assert said[2].startswith("end        trial-000  timed out at step 40, retrieval_r10 - in ")
    assert ": not done; 4 to go, ETA " in said[2]
    assert progress._eta() == 240.0  # four of two minutes, two at a time


def test_differences_are_of_metrics_that_all_runs_have():
    uids = ("a", "b", "c")
    sums = {"keywords/ap": np.array([[1.0, 1], [0, 1], [1, 1]], np.float32)}
    ours = [PerImage({"keywords/ap": 0.75, "words/color_right": 0.5}, uids, sums), PerImage({"keywords/ap": 0.65})]
    base = [PerImage({"keywords/ap": 0.5, "words/color_right": 0.5}, uids, sums), PerImage({"keywords/ap": 0.5})]
    found = differences(ours, base, ["words/color_right", "keywords/ap", "match/auc_random"])
    assert [d["metric"] for d in found] == ["keywords/ap"]
    assert found[0]["mean"] == pytest.approx(0.2) and found[0]["per_seed"] == pytest.approx([0.25, 0.15])


def test_a_file_is_there_in_one_piece(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"a": Path})
    assert json.loads(path.read_text()) == {"a": [1]} and [p.name for p in tmp_path.iterdir()] == ["summary.json"]

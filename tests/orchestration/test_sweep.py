"""A sweep without its runs: rungs, schedulers that know the past, the best, forks, what may change, what is written."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from simla_ray.config.load import load_run
from simla_ray.config.sweep_schema import STORAGE_VARIABLE
from simla_ray.errors import UserError
from simla_ray.evaluation.paired import read_per_image
from simla_ray.orchestration import sweep as sweep_module
from simla_ray.orchestration.launch import Within
from simla_ray.orchestration.series import Series
from simla_ray.orchestration.study import ELSEWHERE
from simla_ray.orchestration.sweep import OpenSweep, _fork, rungs_of, sweep
from simla_ray.orchestration.trials import FAILED, FINISHED, Outcome
from tests.orchestration.sweeps import ITM, PSL, STEPS, Driven, plan_of, search_of, write_run
from tests.report.conftest import write_lines


@pytest.mark.parametrize(
    ("grace", "steps", "every", "reduction", "rungs"),
    [
        (0.1, 90, 10, 3, [10, 30]),  # 90 is the end
        (0.1, 91, 10, 3, [10, 30, 90]),
        (0.25, 160, 40, 3, [40, 120]),
        (0.26, 160, 40, 3, [80]),
        (0.55, 100, 5, 3, [55]),  # 0.55 * 100 is a little more than 55
        (0.1, 100, 10, 1.5, [10, 20, 30, 40, 60, 80]),  # 10, 15, 22.5, 33.75, 50.6, 75.9 at the next validation
        (0.1, 100, 40, 1.2, [40, 80]),  # each once, though four of the rungs fall on 80
        (1.0, 100, 10, 3, []),
        (0.5, 100, 1000, 3, []),
    ],
)
def test_trials_are_judged_at_validations_and_not_at_the_end(grace, steps, every, reduction, rungs, tmp_path):
    plan = plan_of(tmp_path)
    plan = replace(
        plan,
        sweep=plan.sweep.model_copy(update={"grace": grace, "reduction": float(reduction)}),
        base=plan.base.model_copy(update={"eval": plan.base.eval.model_copy(update={"every_steps": every})}),
    )
    assert rungs_of(plan, steps) == rungs


@pytest.fixture
def going(tmp_path):
    """A sweep in its folder, as another command for it would open it."""

    def opened(*overrides):
        plan = plan_of(tmp_path, *overrides)
        folder = tmp_path / "tuned"
        folder.mkdir(exist_ok=True)
        (folder / "sweep.yaml").write_text(sweep_module.to_yaml(plan))
        series = Series(folder, plan.base, Within(None, folder), STEPS, 100, 2, None, lambda line: None)
        found = OpenSweep(plan, series, 0.0)
        search = search_of(plan, found.storage, found.owner, found.study_name)
        found.study = search.study
        return found, Driven(search)

    return opened


class Asha:
    """A scheduler of a sweep, driven as Tune does it."""

    def __init__(self, going, driven):
        self.scheduler, self.driven = going._scheduler(), driven

    def report(self, name, step, value):
        """True where the trial is stopped."""
        trial = SimpleNamespace(trial_id=self.driven.ids[name])
        if trial.trial_id not in self.scheduler._trial_info:
            self.scheduler.on_trial_add(None, trial)
        decision = self.scheduler.on_trial_result(None, trial, {"step": step, "retrieval_r10": value})
        if decision == TrialScheduler.STOP:
            self.driven.end(name, None, value, step=step)
        else:
            self.driven.report(name, step, value)
        return decision == TrialScheduler.STOP


@pytest.mark.parametrize("restart", [False, True])
def test_a_restart_stops_whom_it_would_have_stopped(restart, going):
    """The cutoff is the upper third of all that reached the rung, those that were stopped there among them."""
    first, driven = going()
    asha = Asha(first, driven)
    names = [driven.ask()[0] for _ in range(4)]
    assert not asha.report(names[0], 10, 0.6)
    assert asha.report(names[1], 10, 0.1) and asha.report(names[2], 10, 0.1) and asha.report(names[3], 10, 0.1)
    assert not asha.report(names[0], 30, 0.7)
    driven.end(names[0], value=0.7)
    if restart:
        second, driven = going()
        asha = Asha(second, driven)
    good, bad = driven.ask()[0], driven.ask()[0]
    assert not asha.report(good, 10, 0.4)  # 0.6 and three of 0.1: the upper third begins at 0.1
    assert asha.report(good, 30, 0.6)
    assert asha.report(bad, 10, 0.09)


def test_trials_of_a_trunk_are_judged_behind_it(tmp_path):
    plan = plan_of(tmp_path, "sweep.trunk_steps=50", "eval.every_steps=10", "sweep.grace=0.1", "sweep.reduction=2")
    assert rungs_of(plan, 200) == [60, 120]


def test_a_sweep_without_a_finished_trial_names_no_best(tmp_path, monkeypatch, capsys):
    def run_trials(within, scratch, *, search=None, **options):
        driven = Driven(search)
        while (asked := driven.ask()) is not None:
            driven.end(asked[0], None)

    fake_opened(monkeypatch, None)
    monkeypatch.setattr(sweep_module, "run_trials", run_trials)
    monkeypatch.setattr(sweep_module, "load_sweep", lambda files, overrides: plan_of(tmp_path, *overrides))
    assert sweep_module.sweep_main(["sweep.trials=2"]) == 1
    said = capsys.readouterr().out
    assert "best       none: no trial ran to its end" in said and "best.yaml" not in said
    assert not (tmp_path / "tuned" / "best.yaml").exists()


def test_two_sweeps_of_one_path_are_two(going, tmp_path):
    """Clusters mount what is their own under the same name."""
    found, driven = going()
    name = driven.ask()[0]
    assert sweep_module.owner_of(found.folder) == found.owner
    (found.folder / ".owner").unlink()
    other = search_of(found.plan, found.storage, sweep_module.owner_of(found.folder), found.study_name)
    assert other.owner != found.owner and other.interrupted == [] and other.left == found.plan.sweep.trials
    assert [t.name for t in found._seen()] == [name]


def test_a_sweep_goes_on_with_its_batch(tmp_path, monkeypatch):
    fake_opened(monkeypatch, finishes(tmp_path))
    sweep(plan_of(tmp_path, "sweep.trials=2"), lambda line: None)
    for other in ("batch.micro=4", "eval.pairs=20"):
        with pytest.raises(UserError, match=other.partition("=")[0] + ": the sweep has"):
            sweep(plan_of(tmp_path, "sweep.trials=3", other), lambda line: None)


def test_a_front_stops_nobody(going):
    found, _ = going("sweep.metrics=[retrieval/itc/t2i_r10, keywords/ap]")
    assert found.rungs == [] and found._scheduler() is None


def test_the_best_is_the_best_of_those_that_ran_to_their_end(going):
    found, driven = going()
    assert found.best() is None
    names = [driven.ask()[0] for _ in range(4)]
    driven.end(names[0], value=0.5)
    driven.end(names[1], None, 0.9, step=30)
    driven.end(names[2], value=0.4)
    driven.end(names[3], value=0.4)
    assert found.best().name == names[0] and found.is_default(found.best().params)
    assert found.best(besides_base=True).name == names[2]  # the earlier of equals


def test_the_best_of_a_front_has_the_best_mean_rank(going):
    found, driven = going("sweep.metrics=[retrieval/itc/t2i_r10, keywords/ap]")
    names = [driven.ask()[0] for _ in range(4)]
    for name, (retrieval, ap) in zip(names, ((0.9, 0.0), (0.8, 0.3), (0.7, 0.2), (0.0, 0.9)), strict=True):
        evaluation = {"retrieval": {"itc": {"t2i_r10": retrieval}}, "keywords": {"ap": ap}}
        driven.end(name, summary={"eval": evaluation})
    assert found.best().name == names[1]
    assert sorted(found.write(None, unfinished=True)["front"]) == [names[0], names[1], names[3]]


def test_a_trial_is_evaluated_on_the_validation_set(going, tmp_path):
    found, _ = going("data.val_split=val", "data.test=[a.parquet]", "data.train=[b.parquet]", "data.val=[c.parquet]")
    run = found.run_of("trial-003", {PSL: 5.0})
    assert run.data.test == run.data.val != found.plan.base.data.test and run.data.test_split == "val"
    assert run.data.val == [str(tmp_path.cwd() / "c.parquet")]  # where the command is given, whoever trains it
    assert (run.name, run.eval.best, run.objectives.psl.weight) == ("tuned/trials/trial-003", "retrieval_r10", 5.0)


def test_a_fork_goes_on_from_the_newest_checkpoint_and_only_once(tmp_path, monkeypatch):
    trunk, folder = tmp_path / "trunk", tmp_path / "trials" / "a"
    for name in ("checkpoints/step-10", "checkpoints/step-20", "prepared"):
        (trunk / name).mkdir(parents=True)
        (trunk / name / "data").write_text(name)
    (trunk / "metrics.jsonl").write_text("lines")
    (trunk / "events.jsonl").write_text("the trunk's own")
    monkeypatch.setattr(sweep_module, "find_checkpoint", lambda folder: folder / "step-20")
    (folder / "checkpoints.unfinished" / "step-10").mkdir(parents=True)  # a kill in between
    _fork(trunk, folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "checkpoints/step-20/data", "metrics.jsonl", "prepared/data",
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("more lines")
    _fork(trunk, folder)
    assert (folder / "metrics.jsonl").read_text() == "more lines"


def test_another_space_under_the_same_name_is_refused(tmp_path, going):
    going()
    for other, said in (
        (f"sweep.space={{{PSL}: {{log: [3, 100]}}}}", "sweep.space: the sweep has"),
        ("sweep.seed=3", "sweep.seed: the sweep has 0, now 3"),
        ("optim.lr=0.001", "optim.lr: the sweep has 0.004, now 0.001"),
    ):
        with pytest.raises(UserError, match="was started with another config") as caught:
            sweep(plan_of(tmp_path, other), lambda line: None)
        assert said in str(caught.value)


def fake_opened(monkeypatch, ended):
    """No Ray: a cluster for two runs at a time, runs that end as ``ended`` says."""

    def run_trials(within, scratch, *, follow, search=None, tasks=(), n=1, **options):
        if search is not None:
            driven = Driven(search)
            while (asked := driven.ask()) is not None:
                driven.end(asked[0], value=0.5 - abs(asked[1][ITM] - 2) / 20)
        for task in tasks:
            name = task["run"]["name"]
            follow.ended(name, ended(name, task["run"]))

    class Opened:
        def __init__(self, folder, base, others, wanted, key, timeout_s, say):
            self.series = Series(folder, base, Within(None, folder), STEPS, 100, 2, timeout_s, say)
            folder.mkdir(parents=True, exist_ok=True)

        def __enter__(self):
            return self.series

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(sweep_module, "opened", Opened)
    monkeypatch.setattr(sweep_module, "run_trials", run_trials)
    monkeypatch.setattr("simla_ray.orchestration.series.run_trials", run_trials)


def finishes(tmp_path):
    def ended(name, run):
        write_run(tmp_path / name, {"keywords": {"ap": 0.2 if "default" in name else 0.3}})
        return Outcome(FINISHED, None, STEPS, {}, json.loads((tmp_path / name / "summary.json").read_text()))

    return ended


def test_a_sweep_is_finished_until_it_shall_be_larger(tmp_path, monkeypatch):
    fake_opened(monkeypatch, finishes(tmp_path))
    monkeypatch.setenv(STORAGE_VARIABLE, f"sqlite:///{tmp_path}/kept.db")
    first = sweep(plan_of(tmp_path, "sweep.trials=3"), lambda line: None)
    folder = tmp_path / "tuned"
    assert (first["kind"], first["unfinished"], len(first["trials"])) == ("sweep", False, 3)
    assert first["storage"] is None and "kept.db" not in (folder / "summary.json").read_text()
    assert "kept.db" not in (folder / "sweep.yaml").read_text() and (folder / "report.html").exists()
    assert first["repeats"]["seeds"] == [1, 2] and first["repeats"]["failed"] == []
    assert [d["metric"] for d in first["repeats"]["differences"]] == ["keywords/ap"]
    assert first["repeats"]["differences"][0]["mean"] == pytest.approx(0.1)
    best = next(t for t in first["trials"] if t["name"] == first["best"])
    assert load_run([folder / "best.yaml"]).objectives.psl.weight == pytest.approx(best["params"][PSL])
    said = []
    assert sweep(plan_of(tmp_path, "sweep.trials=3"), said.append) == first
    assert said == [f"sweep      {folder} is finished"]
    more = sweep(plan_of(tmp_path, "sweep.trials=5"), lambda line: None)
    assert [t["name"] for t in more["trials"]] == [f"trial-{i:03d}" for i in range(5)]
    assert more["trials"][:3] == first["trials"]
    for repeats in (first["repeats"], more["repeats"]):  # another trial may be the best of more
        assert [run["name"] for run in repeats["best"]] == [f"{repeats['trial']}-seed{seed}" for seed in (1, 2)]
    seeds = sweep(plan_of(tmp_path, "sweep.trials=5", "sweep.seeds=3"), lambda line: None)
    assert seeds["repeats"]["seeds"] == [1, 2, 3] and seeds["trials"] == more["trials"]
    assert len(read_per_image(folder / "repeats" / "default-seed3").metrics) == 1


def test_repeats_that_fail_leave_a_report(tmp_path, monkeypatch):
    fine = finishes(tmp_path)
    fake_opened(monkeypatch, lambda name, run: fine(name, run) if "default" in name else Outcome(FAILED, "boom", 3))
    summary = sweep(plan_of(tmp_path, "sweep.trials=2"), lambda line: None)
    repeats = summary["repeats"]
    assert (repeats["best"], repeats["differences"], len(repeats["default"])) == ([], [], 2)
    names = [f"{repeats['trial']}-seed{seed}" for seed in (1, 2)]
    assert repeats["failed"] == [{"name": name, "reason": "boom"} for name in names]
    assert "boom" in (tmp_path / "tuned" / "report.html").read_text()
    assert sweep_module.sweep_table(summary)
    fake_opened(monkeypatch, fine)
    said = []
    again = sweep(plan_of(tmp_path, "sweep.trials=2"), said.append)["repeats"]
    assert [line for line in said if line.startswith("again")] == [
        f"again      {name}, which failed before" for name in names
    ]
    assert again["failed"] == [] and again["default"] == repeats["default"] and len(again["best"]) == 2


def test_trials_of_other_sweeps_are_told_without_their_runs(going, tmp_path):
    found, driven = going()
    name = driven.ask()[0]
    driven.end(name, value=0.5)
    write_run(found.folder / "trials" / name, {"keywords": {"ap": 0.25}}, best_step=80)
    lines = [{"step": s, "kind": "val", "metrics": {"retrieval_r10": s / 200}} for s in (70, 80, 90)]
    write_lines(found.folder / "trials" / name / "metrics.jsonl", lines)
    other = Driven(search_of(found.plan, found.storage, "there"))
    other.end(other.ask()[0], value=0.6)
    summary = found.write(None, unfinished=True)
    ours, theirs = summary["trials"]
    assert ours["metrics"] == {"retrieval_r10": 0.4, "keywords/ap": 0.25} and ours["steps"] == 90 and ours["default"]
    assert (theirs["status"], theirs["metrics"], theirs["value"]) == (ELSEWHERE, {}, 0.6)
    assert json.loads((found.folder / "summary.json").read_text()) == summary
    assert yaml.safe_load((found.folder / "sweep.yaml").read_text())["sweep"]["trials"] == 6

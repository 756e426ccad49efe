"""A sweep: many short runs by Ray Tune and Optuna, then the best of them against the base, with fresh seeds."""

from __future__ import annotations

import argparse
import math
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from simla_ray.config.load import difference
from simla_ray.config.schema import Run
from simla_ray.config.sweep import Plan, best_yaml, load_sweep, to_yaml
from simla_ray.errors import UserError, guarded
from simla_ray.evaluation.paired import read_per_image
from simla_ray.jsonl import read_lines
from simla_ray.orchestration.cli import config_arguments, overrides_of, run_arguments
from simla_ray.orchestration.launch import pretrain_until
from simla_ray.orchestration.preflight import dry_run, with_absolute_paths
from simla_ray.orchestration.repeats import run_repeats
from simla_ray.orchestration.runs import run_folder
from simla_ray.orchestration.series import (
    Progress,
    Say,
    Series,
    fresh,
    opened,
    read_summary,
    say_again,
    summary_before,
    write_json,
)
from simla_ray.orchestration.study import (
    ELSEWHERE,
    Search,
    Seen,
    front,
    importance,
    open_storage,
    seen,
)
from simla_ray.orchestration.trials import STOPPED, Follow, Outcome, run_trials
from simla_ray.report.reference import CURVES_TOO
from simla_ray.report.sweep import sweep_table, write_sweep_report
from simla_ray.training.checkpoint import find_checkpoint
from simla_ray.whole import write_whole

#: What of a trunk's folder a trial goes on from, beside its checkpoint.
TRUNK_FILES = ("metrics.jsonl", "dropped.jsonl", "prepared")
#: How metrics that trials are chosen by are called.
NAMES = {"retrieval_r10": "validation R@10", "keyword_ap": "validation keyword AP"}


def sweep_main(argv: Sequence[str]) -> int:
    """``experiments/sweep_psl.py``"""
    parser = argparse.ArgumentParser(
        prog="sweep_psl.py",
        description="Search for objective weights and keyword thresholds that work on your data. Without arguments: 8 "
        "short trials on the built-in world, and the best of them against the base with three fresh seeds.",
    )
    config_arguments(parser)
    run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)

    def main() -> int:
        plan = load_sweep(arguments.config or [], overrides_of(arguments))
        if arguments.print_config:
            print(to_yaml(plan), end="")
            return 0
        say = partial(print, flush=True)
        if arguments.dry_run:
            say("\n".join(lines_of(plan)))
            dry_run(plan.base.model_copy(update={"name": None}), say)
            return 0
        summary = sweep(plan, say)
        print(sweep_table(summary))
        if summary["best"] is not None:
            print(f"best       {plan.base.storage / summary['name'] / 'best.yaml'}")
        print(f"report     {plan.base.storage / summary['name'] / 'report.html'}")
        return 0 if summary["best"] is not None else 1

    return guarded(main, "interrupted; the same command with the same --name goes on")


def sweep(plan: Plan, say: Say = print) -> dict[str, Any]:
    """Run a sweep, or go on with an interrupted one of the same name.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: anything wrong with config, data, storage or resources; or another config under the same name.
    """
    name = plan.base.name or fresh(plan.base.storage, "sweep")
    folder = plan.base.storage.resolve() / name
    changes: dict[str, Any] = {"name": name}
    if not plan.sweep.pareto:  # of trials, repeats and best.yaml the checkpoint that counts is the best by the metric
        changes["eval"] = plan.base.eval.model_copy(update={"best": plan.sweep.metrics[0]})
    plan = replace(plan, base=plan.base.model_copy(update=changes))
    stored, before = folder / "sweep.yaml", summary_before(folder, "sweep")
    if stored.exists():
        _check_same(stored, plan)
    if before is not None and stored.read_text() == to_yaml(plan):
        failed = {run["name"] for run in (before["repeats"] or {"failed": []})["failed"]}
        if not before["unfinished"] and not failed:
            say(f"sweep      {folder} is finished")
            return before
        say_again(failed, say)
    began = time.time() - (before["seconds"] if before is not None else 0.0)
    wanted, limit = plan.sweep.concurrent, plan.sweep.timeout_s
    with opened(folder, plan.base, (), wanted, "sweep.concurrent", limit, say) as series:
        write_whole(stored, to_yaml(plan))
        going = OpenSweep(replace(plan, base=series.base), series, began)
        for line in lines_of(plan):
            say(line)
        going.train_trunk()
        going.search()
        return going.repeat()


def lines_of(plan: Plan) -> list[str]:
    """What is swept, and by what."""
    by = " and ".join(NAMES.get(m, m) for m in plan.sweep.metrics)
    how = "their Pareto front, every trial to its end" if plan.sweep.pareto else "trials are stopped early by it"
    return [
        f"sweep      {plan.sweep.trials} trials of {plan.base.label} by {by}; {how}",
        *(f"space      {path}: {parameter.to_dict()}" for path, parameter in plan.sweep.space.items()),
    ]


def _check_same(stored: Path, plan: Plan) -> None:
    was = load_sweep([stored])
    changed = difference(was.base, plan.base, "identity")
    changed += [d for d in difference(was.base, plan.base, "operational") if d[0] in CURVES_TOO]
    for key, field in type(plan.sweep).model_fields.items():
        a, b = getattr(was.sweep, key), getattr(plan.sweep, key)
        if a != b and field.json_schema_extra == {"kind": "identity"}:
            changed.append((f"sweep.{key}", a, b))
    if changed:
        lines = [f"{path}: the sweep has {a!r}, now {b!r}" for path, a, b in changed]
        raise UserError(
            f"{stored.parent} was started with another config; give the sweep another --name, or undo:\n"
            + "\n".join(lines)
        )


class OpenSweep:
    """A sweep that is going on.

    Args:
        began: when it would have begun, had it never been interrupted.
    """

    def __init__(self, plan: Plan, series: Series, began: float):
        self.plan, self.series, self.began = plan, series, began
        self.folder, self.say = series.folder, series.say
        self.storage = open_storage(plan, self.folder)
        self.owner = owner_of(self.folder)
        self.study_name = plan.sweep.study or self.folder.name
        self.metric = plan.sweep.metrics[0]
        self.rungs = [] if plan.sweep.pareto else rungs_of(plan, series.steps)
        self.params: dict[str, dict[str, Any]] = {}
        self.progress = Progress(
            self.say, self.metric if not plan.sweep.pareto else plan.base.eval.best, self._described
        )

    def run_of(self, name: str, params: dict[str, Any]) -> Run:
        """A trial's run. Its final evaluation is of the validation set too: nothing is chosen on the test set."""
        base = self.plan.base
        over = {
            "name": self.series.name_of("trials", name),
            "data.test": base.data.val,
            "data.test_split": base.data.val_split,
        }
        run = with_absolute_paths(self.plan.run(params, over))
        self.params[str(run.name)] = params
        if self.plan.sweep.trunk_steps:
            _fork(self.folder / "trunk", run_folder(run))
        return run

    def train_trunk(self) -> None:
        """The base up to where the trials part."""
        steps = self.plan.sweep.trunk_steps
        trunk = self.plan.base.model_copy(update={"name": self.series.name_of("trunk")})
        if not steps or find_checkpoint(run_folder(trunk) / "checkpoints", steps) is not None:
            return
        self.say(f"trunk      {steps} steps of the base, from which every trial goes on")
        pretrain_until(trunk, steps, self.say, self.series.within)

    def search(self) -> None:
        """Run what is missing of the trials."""
        search = Search(self.plan, self.storage, self.study_name, self.owner, self.run_of, self.series.steps)
        self.study = search.study
        if not search.left:
            return
        if search.interrupted:
            self.say(f"resume     {len(search.interrupted)} trials go on from their checkpoints")
        self.progress.expect(search.left, self.series.concurrent)
        follow = Follow(self.progress.started, self.progress.reported, self._ended)
        run_trials(
            self.series.within,
            self.series.scratch,
            concurrent=self.series.concurrent,
            timeout_s=self.series.timeout_s,
            follow=follow,
            search=search,
            n=search.left,
            scheduler=self._scheduler(),
        )

    def _scheduler(self) -> TrialScheduler | None:
        """ASHA that knows what earlier starts, and other clusters, have seen at its rungs."""
        if not self.rungs:
            return None
        scheduler = ASHAScheduler(
            time_attr="step",
            metric=self.metric,
            mode="max",
            grace_period=self.rungs[0],
            reduction_factor=self.plan.sweep.reduction,
            max_t=self.series.steps,
        )
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.intermediate_values:
                known = SimpleNamespace(trial_id=f"known-{trial.number}")
                scheduler.on_trial_add(None, known)
                for step, value in sorted(trial.intermediate_values.items()):
                    scheduler.on_trial_result(None, known, {"step": step, self.metric: value})
        return scheduler

    def _described(self, name: str) -> str:
        params = self.params.get(name)
        if params is None:
            return ""
        if params == self.plan.default_params()[0]:
            return "the base itself"
        return " ".join(f"{path.removeprefix('objectives.')}={_short(value)}" for path, value in params.items())

    def _ended(self, name: str, outcome: Outcome) -> None:
        self.progress.ended(name, outcome)
        self.write(None, unfinished=True)

    def repeat(self) -> dict[str, Any]:
        """Train the best and the base again with fresh seeds, evaluated on the test set; write everything."""
        best = self.best()
        repeats = None
        if best is None:
            self.say("best       none: no trial ran to its end; the same command with more of sweep.trials goes on")
        else:
            write_whole(self.folder / "best.yaml", best_yaml(self.plan, best.params))
            values = ", ".join(
                f"{NAMES.get(m, m)} {100 * v:.1f} %"
                for m, v in zip(self.plan.sweep.metrics, best.values or [], strict=True)
            )
            self.say(f"best       {best.name}: {values}")
            if self.plan.sweep.seeds:
                rival = best if not self.is_default(best.params) else self.best(besides_base=True)
                repeats = run_repeats(self.plan, self.series, self.progress, rival)
        return self.write(repeats, unfinished=False)

    def is_default(self, params: dict[str, Any]) -> bool:
        return params == self.plan.default_params()[0]

    def best(self, *, besides_base: bool = False) -> Seen | None:
        """The best of all trials that ran to their end; of a front the one with the best mean rank."""
        done = [t for t in self._seen() if t.values is not None and not (besides_base and self.is_default(t.params))]
        if not done:
            return None
        ranks = [sorted((t.values[k] for t in done), reverse=True) for k in range(len(self.plan.sweep.metrics))]  # type: ignore[index]
        return min(done, key=lambda t: (sum(r.index(v) for r, v in zip(ranks, t.values or [], strict=True)), t.number))

    def _seen(self) -> list[Seen]:
        return seen(self.study, self.owner)

    def write(self, repeats: dict[str, Any] | None, *, unfinished: bool) -> dict[str, Any]:
        """summary.json and report.html, as far as the sweep has come."""
        best = self.best()
        summary = {
            "kind": "sweep",
            "name": self.folder.name,
            "label": self.plan.base.label,
            "study": self.study_name,
            "storage": None if self.plan.sweep.storage is None else str(self.plan.sweep.storage),
            "unfinished": unfinished,
            "seconds": time.time() - self.began,
            "steps": self.series.steps,
            "rungs": self.rungs,
            "trunk_steps": self.plan.sweep.trunk_steps,
            "concurrent": self.series.concurrent,
            "objectives": [{"metric": m, "name": NAMES.get(m, m)} for m in self.plan.sweep.metrics],
            "space": {path: parameter.to_dict() for path, parameter in self.plan.sweep.space.items()},
            "trials": [self._trial(trial) for trial in self._seen()],
            "best": best.name if best is not None else None,
            "front": front(self.study),
            "importance": importance(self.study),
            "repeats": repeats,
        }
        write_json(self.folder / "summary.json", summary)
        write_sweep_report(self.folder)
        return summary

    def _trial(self, trial: Seen) -> dict[str, Any]:
        folder = self.folder / "trials" / trial.name
        summary = None if trial.status == ELSEWHERE else read_summary(folder)
        lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "val"]
        metrics = dict(read_per_image(folder).metrics) if summary is not None else {}
        step = trial.step
        if lines and trial.status != ELSEWHERE:
            at = next((x for x in lines if summary is not None and x["step"] == summary["best_step"]), lines[-1])
            metrics = at["metrics"] | metrics
            step = max(step, lines[-1]["step"])
        pareto = self.plan.sweep.pareto
        return {
            "number": trial.number,
            "name": trial.name,
            "params": trial.params,
            "metrics": metrics,
            "value": None if pareto else trial.values[0] if trial.values else metrics.get(self.metric),
            "values": trial.values if pareto else None,
            "status": trial.status,
            "stopped_early": trial.status == STOPPED,
            "reason": trial.reason,
            "steps": step,
            "seconds": trial.seconds,
            "default": trial.default or self.is_default(trial.params),
        }


def owner_of(folder: Path) -> str:
    """What the trials of this sweep are marked with in a study; a path would be the same on another cluster."""
    file = folder / ".owner"
    if not file.exists():
        write_whole(file, uuid.uuid4().hex)
    return file.read_text()


def rungs_of(plan: Plan, steps: int) -> list[int]:
    """Steps at which a trial may be stopped: validations after the grace, each ``reduction`` times the last."""
    every = plan.base.eval.every_steps
    # Before the trials part they are all alike, and an equal of all is never stopped.
    rung = float(max(1, _up(plan.grace() * steps / every), plan.sweep.trunk_steps // every + 1) * every)
    found = set()
    while rung < steps:
        found.add(_up(rung / every) * every)
        rung *= plan.sweep.reduction
    return sorted(rung for rung in found if rung < steps)


def _up(value: float) -> int:
    """Rounded up, but not for the last bit: 0.55 * 100 is more than 55."""
    return math.ceil(value - 1e-9)


def _fork(trunk: Path, folder: Path) -> None:
    """Let a run that has not begun go on from a trunk's checkpoint."""
    if (folder / "checkpoints").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    newest = find_checkpoint(trunk / "checkpoints")
    assert newest is not None
    for name in TRUNK_FILES:
        if (trunk / name).is_dir():
            shutil.copytree(trunk / name, folder / name, dirs_exist_ok=True)
        elif (trunk / name).exists():
            shutil.copy(trunk / name, folder / name)
    unfinished = folder / "checkpoints.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(newest, unfinished / newest.name)
    unfinished.rename(folder / "checkpoints")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

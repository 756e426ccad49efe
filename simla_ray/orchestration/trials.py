"""Many runs in one cluster. Each is a trial of Ray Tune: a light driver that starts the same launch code as pretrain.

A trial tells Tune what its run writes down, so that one which goes on after a kill tells the scheduler again what it
knew. Everything that lasts is in the runs' folders; of Tune's own files nothing is read again.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from simla_ray.config.load import to_dict
from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.orchestration.cluster import Cluster, uses_gpu
from simla_ray.orchestration.launch import Within, pretrain
from simla_ray.orchestration.progress import new_lines
from simla_ray.orchestration.runs import run_folder
from simla_ray.training.events import note_stop

#: Logical CPUs of a trial's driver, which waits for most of its time.
DRIVER_CPUS = 0.1
#: Seconds between two looks at what a run has written.
LOOK_S = 0.5
#: Seconds that a run has to end by itself, once it was told to.
END_S = 30.0
#: Times that Tune starts a trial again whose driver's process or node was lost.
LOST_DRIVERS = 2
FINISHED, STOPPED, FAILED, TIMED_OUT = "finished", "stopped", "failed", "timed_out"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. ``metrics``: of the last validation, or of the summary where it finished."""

    status: str
    reason: str | None = None
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] | None = None


def task_of(run: Run, steps: int) -> dict[str, Any]:
    """What Tune hands to a trial: a run with a name, and how many steps it has."""
    return {"run": to_dict(run), "steps": steps}


def at_a_time(run: Run, wanted: int | None) -> int:
    """How many such runs go at a time, as far as it can be said before a cluster is joined.

    A Ray of our own gets as many logical CPUs as they ask for, so there it goes by this machine's cores.
    """
    if wanted is not None:
        return wanted
    return max(1, int((os.cpu_count() or 1) / (run.ray.workers * run.ray.cpus_per_worker)))


def fitting(run: Run, cluster: Cluster, wanted: int | None, key: str) -> int:
    """How many such runs a cluster has room for at a time; never more than ``wanted``, which is what ``key`` says.

    Raises:
        UserError: not for one, or not for as many as are wanted; with the numbers.
    """
    each, gpu = run.ray.cpus_per_worker, uses_gpu(run, cluster.gpus)
    needed = run.ray.workers * each + run.data.decode_cpus + DRIVER_CPUS
    fit = int(cluster.cpus / needed)
    if cluster.own:
        fit = min(fit, at_a_time(run, wanted))
    if gpu:
        fit = min(fit, int(cluster.gpus / run.ray.workers))
    if fit < (wanted or 1):
        takes = f"{needed:g} CPUs ({run.ray.workers} workers of {each:g}, {run.data.decode_cpus} to decode, a driver)"
        takes += f" and {run.ray.workers} GPUs" if gpu else ""
        raise UserError(
            f"{key}: {wanted or 1} at a time, but one takes {takes}, and the cluster's {cluster.cpus:g} CPUs and "
            f"{cluster.gpus:g} GPUs have room for {fit}; use fewer of ray.workers or data.decode_cpus, or add nodes"
        )
    return wanted or fit


class Follow(tune.Callback):
    """Tells of trials, by the names of their runs: that one started, what it reported, how it ended."""

    def __init__(
        self,
        started: Callable[[str], None],
        reported: Callable[[str, dict[str, Any]], None],
        ended: Callable[[str, Outcome], None],
    ):
        self.started, self.reported, self.ended = started, reported, ended

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy of its callbacks in a file that nobody reads."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.started(name_of(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "status" not in result:
            self.reported(name_of(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.ended(name_of(trial), outcome_of(trial.last_result))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.ended(name_of(trial), outcome_of(None))


def name_of(trial: Trial) -> str:
    return trial.config["trial"]["run"]["name"]


def outcome_of(result: dict[str, Any] | None) -> Outcome:
    """What Tune was told last; None where the driver of the trial was lost."""
    if result is None:
        return Outcome(FAILED, "the process of its driver was lost")
    return Outcome(
        result.get("status", STOPPED),  # a trial that ends by itself says how
        result.get("reason"),
        result.get("step", 0),
        result.get("metrics", {}),
        result.get("summary"),
    )


def train_trial(config: dict[str, Any], within: Within, timeout_s: float | None) -> None:
    """Train one run, and report its validations; the last one with how it ended."""
    run, total = Run.model_validate(config["trial"]["run"]), config["trial"]["steps"]
    folder = run_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    ended: dict[str, Any] = {}
    thread = threading.Thread(target=partial(_train, run, within, folder, ended), daemon=True)
    began = time.monotonic()
    thread.start()
    offset, last = 0, {"step": 0, "metrics": {}}
    while True:
        thread.join(LOOK_S)
        alive = thread.is_alive()
        lines, offset = new_lines(folder / "metrics.jsonl", offset)
        for line in lines:
            if line["kind"] != "val" or line["step"] <= last["step"]:
                continue
            broken = [name for name, value in line["metrics"].items() if not math.isfinite(value)]
            if broken:
                why = f"not finite at step {line['step']}: {', '.join(broken)}"
                # Workers that are being started anew end by themselves; cut off there they would keep their CPUs.
                note_stop(folder, why)
                thread.join(END_S)
                tune.report({**last, "status": FAILED, "reason": why})
                return
            # The last validation is told when the run has been evaluated: a scheduler may stop whom it hears.
            if line["step"] < total:
                last = {"step": line["step"], "metrics": line["metrics"]}
                tune.report({**last, **line["metrics"]})
        if not alive:
            break
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            tune.report({**last, "status": TIMED_OUT, "reason": f"not done after {timeout_s:g} s"})
            return
    if "summary" in ended:
        best = _validation_of(folder, ended["summary"]["best_step"])
        last = {"step": ended["summary"]["steps"], "metrics": best}
        tune.report({**last, **best, "status": FINISHED, "summary": ended["summary"]})
    else:
        tune.report({**last, "status": FAILED, "reason": ended["reason"]})


def _train(run: Run, within: Within, folder: Path, ended: dict[str, Any]) -> None:
    try:
        with (folder / "output.txt").open("a", buffering=1) as output:
            ended["summary"] = pretrain(run, lambda line: print(line, file=output), within)
    except UserError as error:
        ended["reason"] = str(error)
    except BaseException as error:
        with (folder / "failures.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} driver\n{traceback.format_exc()}\n")
        ended["reason"] = f"{type(error).__name__}: {error}"


def _validation_of(folder: Path, step: int) -> dict[str, float]:
    """The metrics of the validation at a step."""
    lines, _ = new_lines(folder / "metrics.jsonl", 0)
    return next((line["metrics"] for line in lines if line["kind"] == "val" and line["step"] == step), {})


def run_trials(
    within: Within,
    scratch: Path,
    *,
    concurrent: int,
    timeout_s: float | None,
    follow: Follow,
    tasks: Sequence[dict[str, Any]] = (),
    search: Searcher | None = None,
    n: int = 1,
    scheduler: TrialScheduler | None = None,
) -> None:
    """Run ``tasks`` as they are given, or ``n`` that ``search`` proposes; returns when all have ended.

    Args:
        scratch: folder for Tune's own files, removed in the end.
        timeout_s: of a single trial.
        scheduler: may stop trials at a report; None stops none.
    """
    # Tune's handler would swallow Ctrl-C; its loggers would write what the runs' folders hold already.
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that fails has no metric
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    for logger in ("ray.tune", "ray.tune.execution", "optuna"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # how a trial failed is said where it is told
    trial = tune.with_parameters(train_trial, within=within, timeout_s=timeout_s)
    try:
        tune.Tuner(
            tune.with_resources(trial, {"CPU": DRIVER_CPUS}),
            param_space={"trial": tune.grid_search(list(tasks))} if search is None else None,
            tune_config=tune.TuneConfig(
                search_alg=search, scheduler=scheduler, num_samples=n, max_concurrent_trials=concurrent
            ),
            run_config=tune.RunConfig(
                name=scratch.name,
                storage_path=str(scratch.parent.resolve()),
                verbose=0,
                callbacks=[follow],
                failure_config=tune.FailureConfig(max_failures=LOST_DRIVERS),
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

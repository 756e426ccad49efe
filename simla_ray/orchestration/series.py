"""What a sweep and a comparison have in common: a folder of runs, a cluster they share, one line for what happens."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.errors import UserError
from simla_ray.evaluation.paired import PerImage, paired_difference
from simla_ray.orchestration import cluster as clusters
from simla_ray.orchestration.launch import Within, locked
from simla_ray.orchestration.plan import total_steps
from simla_ray.orchestration.preflight import check, check_cluster
from simla_ray.orchestration.prepare import prepare_shared
from simla_ray.orchestration.reclaim import reclaiming
from simla_ray.orchestration.runs import check_kind, run_folder, unlike_stored
from simla_ray.orchestration.trials import (
    DRIVER_CPUS,
    FINISHED,
    Follow,
    Outcome,
    at_a_time,
    fitting,
    run_trials,
    task_of,
)
from simla_ray.report.terminal import clock
from simla_ray.whole import write_whole

Say = Callable[[str], None]
#: Lines about runs of another config.
MOST_LINES = 8


@dataclass(frozen=True)
class Series:
    """An open folder of runs.

    Args:
        base: with absolute paths; what the cluster was looked at for.
        steps: of the base; ``vocabulary_size``, its word pieces.
        concurrent: runs at a time.
    """

    folder: Path
    base: Run
    within: Within
    steps: int
    vocabulary_size: int
    concurrent: int
    timeout_s: float | None
    say: Say

    def name_of(self, *parts: str) -> str:
        """Name of a run in this folder, as its config has it."""
        return "/".join((self.folder.name, *parts))

    def check_unchanged(self, runs: Sequence[tuple[Run, int]]) -> None:
        """Refuse to take what lies in a run's folder for another experiment's.

        Raises:
            UserError: names runs and keys.
        """
        found = []
        for run, _ in runs:
            # Where regions and tags come from is decided by looking at the data, which is seldom necessary.
            if unlike_stored(run) and (changed := unlike_stored(check(run, devices=False)[0])):
                keys = "; ".join(f"{path} {was!r}, now {now!r}" for path, was, now in changed)
                found.append(f"{_last(str(run.name))}: {keys}")
        if found:
            more = [f"and {len(found) - MOST_LINES} more"] if len(found) > MOST_LINES else []
            raise UserError(
                f"{self.folder} holds runs of another config; give it another --name, or undo:\n"
                + "\n".join([*found[:MOST_LINES], *more])
            )

    def run_all(self, runs: Sequence[tuple[Run, int]], progress: Progress) -> dict[str, Outcome]:
        """Train runs with their steps; those that have ended are not started again. Name -> how each ended.

        Raises:
            UserError: see ``check_unchanged``.
        """
        self.check_unchanged(runs)
        ended: dict[str, Outcome] = {}
        waiting = []
        for run, steps in runs:
            summary = read_summary(run_folder(run))
            if summary is None:
                waiting.append(task_of(run, steps))
            else:
                ended[str(run.name)] = Outcome(FINISHED, None, summary["steps"], {}, summary)
        if waiting:
            progress.expect(len(waiting), self.concurrent)

            def note(name: str, outcome: Outcome) -> None:
                ended[name] = outcome
                progress.ended(name, outcome)

            run_trials(
                self.within,
                self.scratch,
                concurrent=self.concurrent,
                timeout_s=self.timeout_s,
                follow=Follow(progress.started, progress.reported, note),
                tasks=waiting,
            )
        return {str(run.name): ended[str(run.name)] for run, _ in runs if str(run.name) in ended}

    @property
    def scratch(self) -> Path:
        return self.folder / ".tune"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a run, a sweep or a comparison; None where there is none yet."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def summary_before(folder: Path, kind: str) -> dict[str, Any] | None:
    """What an earlier command for the same sweep or comparison has left.

    Raises:
        UserError: the folder is something else's.
    """
    check_kind(folder, kind)
    return read_summary(folder)


def say_again(failed: Iterable[str], say: Say) -> None:
    """Runs that failed are tried again by the same command: a full disk or a lost cluster is mended between the two."""
    for name in sorted(failed):
        say(f"again      {name}, which failed before")


def differences(a: Sequence[PerImage], b: Sequence[PerImage], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """How far runs a are above runs b of the same seeds, in those of the metrics that all of them have."""
    there = [metric for metric in metrics if all(metric in run.metrics for run in (*a, *b))]
    return [paired_difference(a, b, metric) for metric in there]


def fresh(storage: Path, kind: str) -> str:
    """``<kind>-<number>``, the first number that is free under storage."""
    taken = [re.fullmatch(rf"{kind}-(\d+)", path.name) for path in storage.glob(f"{kind}-*")]
    return f"{kind}-{max((int(m[1]) for m in taken if m), default=0) + 1:03d}"


@contextmanager
def opened(
    folder: Path, base: Run, others: Sequence[Run], wanted: int | None, key: str, timeout_s: float | None, say: Say
) -> Iterator[Series]:
    """Look for everything that would stop the runs, join a cluster for them, and keep others out of the folder.

    Args:
        others: further runs to look at, which take no more of a cluster than the base.
        wanted: runs at a time, which ``key`` of the config says; None for as many as fit.

    Raises:
        UserError: the first thing that is wrong.
    """
    base, indexes = check(base)
    for run in others:
        check(run)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        cluster = clusters.join(base, at_a_time(base, wanted))
        say(cluster.line())
        concurrent = fitting(base, cluster, wanted, key)
        check_cluster(base, cluster, indexes, say)
        pipeline.quiet()
        shared = folder / "shared"
        if not shared.exists():
            say("prepare    data, vocabulary and visual codes, once for all runs")
        prepared = prepare_shared(base, shared, base.data.decode_cpus * concurrent)
        steps = total_steps(base, pipeline.order_of(base, prepared.indexes["train"]), None)
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's new output cannot be switched off
        with reclaiming(say, {"CPU": DRIVER_CPUS}):
            yield Series(
                folder, base, Within(cluster, shared), steps, len(prepared.vocabulary), concurrent, timeout_s, say
            )


@dataclass
class Progress:
    """Says what happens to runs, and how long the rest will take.

    Args:
        shown: validation metric in the lines.
        describe: name of a run -> what it is.
    """

    say: Say
    shown: str
    describe: Callable[[str], str]
    began: dict[str, float] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)
    left: int = 0
    at_once: int = 1

    def expect(self, n: int, concurrent: int) -> None:
        self.left, self.at_once = n, concurrent

    def started(self, name: str) -> None:
        self.began[name] = time.monotonic()
        self.say(f"start      {_last(name)}  {self.describe(name)}".rstrip())

    def reported(self, name: str, result: Mapping[str, Any]) -> None:
        self.say(f"step       {_last(name)}  {result['step']}  {self._metric(result.get('metrics', {}))}")

    def ended(self, name: str, outcome: Outcome) -> None:
        seconds = time.monotonic() - self.began.get(name, time.monotonic())
        self.took.append(seconds)
        self.left = max(0, self.left - 1)
        why = f": {outcome.reason.splitlines()[0]}" if outcome.reason else ""
        eta = f"; {self.left} to go, ETA {clock(self._eta())}" if self.left else ""
        said = outcome.status.replace("_", " ")
        self.say(
            f"{'end':<10} {_last(name)}  {said} at step {outcome.step}, {self._metric(outcome.metrics)} in "
            f"{clock(seconds)}{why}{eta}"
        )

    def _eta(self) -> float:
        return sum(self.took) / len(self.took) * self.left / min(self.at_once, max(1, self.left))

    def _metric(self, metrics: Mapping[str, float]) -> str:
        value = metrics.get(self.shown)
        return f"{self.shown} {100 * value:.1f} %" if value is not None else f"{self.shown} -"


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def write_json(path: Path, tree: dict[str, Any]) -> None:
    write_whole(path, json.dumps(tree, indent=1))

"""The trials of a sweep, in the words of its page and its table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Trial = Mapping[str, Any]

#: Status in the summary -> in words.
STATUS = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "timed_out": "timed out",
    "running": "running",
    "elsewhere": "on another cluster",
}
VALIDATED = {"metric": "retrieval_r10", "name": "validation R@10"}


@dataclass(frozen=True)
class Trials:
    """Trials by number, read from a sweep's summary."""

    summary: Mapping[str, Any]

    @cached_property
    def every(self) -> list[Trial]:
        """Each once, by number; of two with one name the later entry counts."""
        once = {trial["name"]: trial for trial in self.summary.get("trials") or []}
        return sorted(once.values(), key=lambda trial: (trial["number"] is None, trial["number"] or 0, trial["name"]))

    @cached_property
    def by_name(self) -> dict[str, Trial]:
        return {trial["name"]: trial for trial in self.every}

    @property
    def objectives(self) -> list[Mapping[str, str]]:
        return self.summary.get("objectives") or [VALIDATED]

    @property
    def pareto(self) -> bool:
        return len(self.objectives) > 1

    @property
    def best(self) -> list[str]:
        """The best trial, or those on the Pareto front."""
        if self.pareto:
            return list(self.summary.get("front") or [])
        return [self.summary["best"]] if self.summary.get("best") else []

    @property
    def default(self) -> Trial | None:
        """The trial that is the base config itself."""
        return next((trial for trial in self.every if trial.get("default")), None)

    @property
    def base_so_far(self) -> str:
        """Where the base was stopped, for beside its value: it is no match for one that ran to its end."""
        base = self.default
        return f", stopped at step {base.get('steps') or 0:,}" if base is not None and base.get("stopped_early") else ""

    @property
    def finished(self) -> list[Trial]:
        return [trial for trial in self.every if trial["status"] == "finished"]

    @property
    def running(self) -> int:
        return sum(trial["status"] == "running" for trial in self.every)

    @property
    def points(self) -> dict[str, tuple[float, float]]:
        """Name -> both values, with two objectives."""
        found = {trial["name"]: (self.value(trial, 0), self.value(trial, 1)) for trial in self.every}
        return {name: (a, b) for name, (a, b) in found.items() if a is not None and b is not None}

    def value(self, trial: Trial | None, objective: int = 0) -> float | None:
        """A trial's value by one of the objectives; None where it has no finite one."""
        if trial is None:
            return None
        if not self.pareto:
            value = trial.get("value")
        else:
            values = trial.get("values") or []
            value = values[objective] if objective < len(values) else None
        return float(value) if value is not None and math.isfinite(value) else None

    def kind(self, trial: Trial) -> str:
        """The look of its curve: its status, unless it is the best one or the base config."""
        if trial["name"] in self.best:
            return "best"
        return "default" if trial.get("default") and trial["status"] == "finished" else str(trial["status"])

    def status(self, trial: Trial) -> str:
        return STATUS.get(trial["status"], str(trial["status"]))

    def counts(self) -> str:
        """``6 finished, 4 stopped early``."""
        count = Counter(self.status(trial) for trial in self.every)
        return ", ".join(f"{count.pop(words)} {words}" for words in [*STATUS.values(), *count] if count.get(words))

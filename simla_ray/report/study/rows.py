"""The rows of a comparison, in the words of its page and its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from simla_ray.report.study.comparison_figures import fraction_name
from simla_ray.report.study.metrics import Difference, column_name, points

Row = Mapping[str, Any]
BUDGETS = {"samples": "equal samples", "compute": "equal compute"}


@dataclass(frozen=True)
class Rows:
    """Rows and differences, read from a comparison's summary."""

    summary: Mapping[str, Any]

    @cached_property
    def every(self) -> list[Row]:
        """In the order of the summary, the reference first within a budget and a fraction, the whole data first."""
        place = {budget: i for i, budget in enumerate(BUDGETS)}
        return sorted(
            self.summary.get("rows") or [],
            key=lambda row: (place.get(row["budget"], 9), -row["fraction"], row["entry"] != self.reference),
        )

    @property
    def reference(self) -> str:
        return str(self.summary.get("reference", ""))

    @property
    def seeds(self) -> list[int]:
        return list(self.summary.get("seeds") or [])

    @property
    def fractions(self) -> list[float]:
        return sorted({row["fraction"] for row in self.every})

    @property
    def entries(self) -> list[str]:
        return list(dict.fromkeys(row["entry"] for row in self.every))

    @property
    def metrics(self) -> list[str]:
        """Metrics of the table, in the order of the rows."""
        return list(dict.fromkeys(metric for row in self.every for metric in row["metrics"]))

    @property
    def differences(self) -> list[Mapping[str, Any]]:
        """Those of entries; the reference's to itself says nothing."""
        return [d for d in self.summary.get("differences") or [] if d["entry"] != self.reference]

    def of(self, metric: str) -> list[tuple[str, Difference]]:
        """(row's name, difference to the reference) of a metric, where there is a mean, in the order of the rows."""
        found = {self._key(d): d for d in self.differences if d["metric"] == metric and _known(d.get("mean"))}
        return [(self.name(row), found[self._key(row)]) for row in self.every if self._key(row) in found]

    def whole(self, row: Row) -> bool:
        """Whether a row, or a difference, is of the largest share of the data."""
        return bool(row["fraction"] == self.fractions[-1])

    def name(self, row: Row) -> str:
        """The entry, with budget and fraction where the comparison has several."""
        parts = [row["entry"]]
        if len({r["budget"] for r in self.every}) > 1:
            parts.append(BUDGETS.get(row["budget"], row["budget"]))
        if len(self.fractions) > 1:
            share = fraction_name(row["fraction"])
            parts.append("all data" if share == "all" else f"{share} of the data")
        return ", ".join(parts)

    @property
    def failed(self) -> list[tuple[Row, Mapping[str, Any]]]:
        """(row, run with its reason), each run once although several rows may share it."""
        once = {run["name"]: (row, run) for row in reversed(self.every) for run in reversed(row.get("failed") or [])}
        return list(reversed(once.values()))

    @property
    def runs(self) -> list[str]:
        """Names of the finished runs, each once."""
        return list(dict.fromkeys(run for row in self.every for run in row["runs"]))

    @property
    def missing(self) -> int:
        """Places in the rows that have neither a finished nor a failed run yet."""
        return sum(max(0, len(self.seeds) - len(row["runs"]) - len(row.get("failed") or [])) for row in self.every)

    def cautions(self) -> list[str]:
        """What the table does not say: what was held equal, and what follows from its own numbers."""
        found = list(self.summary.get("notes") or [])
        seeds = len(self.seeds)
        if len(self.fractions) > 1 and any(metric.startswith(("keywords/", "words/")) for metric in self.metrics):
            found.append(
                "Keywords and masked words are those that the captions of a share have: compare entries at one share, "
                "not an entry with itself at another."
            )
        if seeds == 1:
            found.append(
                "One seed: what is chance between two trainings cannot be told, and intervals are over pictures only."
            )
        elif seeds - 1 in CHI2_LOW:
            found.append(
                f"{seeds} seeds: a spread over so few is itself uncertain, up to about "
                f"{_factor(seeds):.1f} times as large as it looks."
            )
        small = [
            f"{name}, {column_name(d['metric'])} ({points(d['metric'], d['mean'])})"
            for metric in self.metrics
            for name, d in self.of(metric)
            if (spread := _spread(d)) is not None and abs(d["mean"]) < spread
        ]
        if small:
            found.append(f"Smaller than the spread over seeds: {_some(small)}.")
        missing = [
            f"{self.name(row)} ({len(row['runs'])} of {seeds})" for row in self.every if len(row["runs"]) < seeds
        ]
        if missing:
            found.append(f"Fewer seeds than the others: {_some(missing)}.")
        for line, entries in self._fallbacks().items():
            whose = "All entries" if len(entries) == len(self.entries) else ", ".join(entries)
            found.append(f"{whose}: not the method as published in this: {line}.")
        budgets, costs = ({row["budget"] for row in self.every}, {_round(row.get("compute")) for row in self.every})
        if budgets == {"samples"} and len(costs) > 1:
            found.append("Equal samples are not equal compute: see the column of compute relative to the reference.")
        own = {row["entry"]: row["recipe"] for row in self.every if row.get("recipe")}
        if own:
            found.append(
                f"Not by the recipe of the others, but by one of its own: "
                f"{', '.join(f'{entry} ({name})' for entry, name in own.items())}."
            )
        elif not any(path.startswith("optim.") for row in self.every for path in row.get("overrides") or {}):
            found.append(
                "All entries share one recipe (learning rate, warm-up, weight decay); each tuned for itself, they "
                "could lie in another order."
            )
        return found

    def _fallbacks(self) -> dict[str, list[str]]:
        """What is not as published -> entries of which that is so."""
        found: dict[str, list[str]] = {}
        for row in self.every:
            for line in row.get("fallbacks") or []:
                entries = found.setdefault(line, [])
                if row["entry"] not in entries:
                    entries.append(row["entry"])
        return found

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[str, str, float]:
        return row["entry"], row["budget"], row["fraction"]


def _spread(d: Difference) -> float | None:
    known = [d[side] for side in ("std_a", "std_b") if _known(d.get(side))]
    return max(known) if known else None


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


#: Quantile 0.025 of chi-squared by its degrees of freedom.
CHI2_LOW = {1: 0.000982, 2: 0.0506, 3: 0.216, 4: 0.484, 5: 0.831, 6: 1.24, 7: 1.69, 8: 2.18, 9: 2.70}


def _factor(seeds: int) -> float:
    """Upper end of the 95 % interval of a standard deviation of normal values, over what was measured."""
    return math.sqrt((seeds - 1) / CHI2_LOW[seeds - 1])


def _some(items: Sequence[str], most: int = 6) -> str:
    return "; ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")

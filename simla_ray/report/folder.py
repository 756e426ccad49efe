"""A run's folder, read for its report: whatever is there; what is absent stays absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simla_ray.config.load import load_run
from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.types import with_intervals
from simla_ray.whole import write_whole


@dataclass(frozen=True)
class RunFolder:
    """What a run has written so far. ``summary`` is None until the run has ended."""

    name: str
    run: Run
    config_text: str
    manifest: dict[str, Any]
    summary: dict[str, Any] | None
    train: list[dict[str, Any]]  # metrics.jsonl, a line per step
    val: list[dict[str, Any]]  # metrics.jsonl, a line per validation
    events: list[dict[str, Any]]
    dropped: list[dict[str, Any]]
    examples: dict[str, list[dict[str, Any]]]  # task -> what its figures are drawn from
    results: dict[str, dict[str, Any]]  # task -> its metrics, with their ``intervals``

    @property
    def label(self) -> str:
        return str((self.summary or {}).get("label") or self.manifest.get("label") or self.run.label)

    @property
    def step(self) -> int:
        """The last step that is logged."""
        return max((line["step"] for line in self.train), default=0)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, as far as they are known."""
        if self.summary and self.summary.get("steps"):
            return int(self.summary["steps"])
        if self.run.optim.max_steps is not None:
            return self.run.optim.max_steps
        rows = self.manifest.get("data", {}).get("train", {}).get("rows", 0)
        return max(self.step, int(self.run.optim.epochs * rows / self.run.batch.global_))

    @property
    def phase_steps(self) -> list[int]:
        """Steps at which another set of objectives begins."""
        return [round(phase.until * self.total_steps) for phase in self.run.schedule.phases[:-1]]

    @property
    def restart_steps(self) -> list[int]:
        """Steps from which an interrupted run went on."""
        return sorted({int(e["step"]) for e in self.events if e.get("event") == "resume" and "step" in e})

    def at_log_points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a number that only log points have, such as ``pairs_per_s``."""
        return [(line["step"], line[key]) for line in self.train if line.get(key) is not None]

    def loss(self, objective: str) -> list[tuple[int, float]]:
        """(step, training loss) of an objective, at the steps at which it was on."""
        return [(line["step"], v) for line in self.train if (v := line.get("losses", {}).get(objective)) is not None]

    def validation(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a validation metric."""
        return [(line["step"], v) for line in self.val if (v := line.get("metrics", {}).get(metric)) is not None]


def read_folder(folder: Path) -> RunFolder:
    """Read a finished or interrupted run.

    Raises:
        UserError: no config.yaml there, or a file that is not what a run writes.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder}: no config.yaml in it; give the folder of a run")
    lines = read_lines(folder / "metrics.jsonl")
    evaluation = read_tree(folder / "evaluation.json") or {}
    summary = read_tree(folder / "summary.json")
    results = {
        task: with_intervals(result.get("metrics", {}), result.get("intervals", {}))
        for task, result in evaluation.items()
    }
    return RunFolder(
        name=str((summary or {}).get("name") or folder.resolve().name),
        run=load_run([config], presets=False),
        config_text=config.read_text(),
        manifest=read_tree(folder / "manifest.json") or {},
        summary=summary,
        train=[line for line in lines if line.get("kind") == "train"],
        val=[line for line in lines if line.get("kind") == "val"],
        events=read_lines(folder / "events.jsonl"),
        dropped=read_lines(folder / "dropped.jsonl"),
        examples={task: result.get("examples", []) for task, result in evaluation.items()},
        results=(summary or {}).get("eval") or results,
    )


def write_page(folder: Path, text: str) -> Path:
    """Put ``report.html`` in place in one step."""
    report = folder / "report.html"
    write_whole(report, text)
    return report


def read_tree(path: Path) -> dict[str, Any] | None:
    """Keys and values of a JSON file; None where there is none."""
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path}: not JSON; remove it to get a report without it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found a {type(tree).__name__}")
    return tree

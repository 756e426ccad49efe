"""summary.json: a finished run in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from simla_ray.config.schema import Run
from simla_ray.jsonl import read_lines
from simla_ray.orchestration.prepare import Prepared
from simla_ray.types import with_intervals
from simla_ray.whole import write_whole


def write_summary(folder: Path, run: Run, prepared: Prepared, total: int) -> dict[str, Any]:
    """Write and return the summary; what a method has not is absent."""
    lines = read_lines(folder / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    state = json.loads((folder / "state.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    events = read_lines(folder / "events.jsonl")
    dropped = {line["uid"]: line["reason"] for line in read_lines(folder / "dropped.jsonl")}
    began = next((e["time"] for e in events if e["event"] == "start"), None)
    trained = next((e["time"] for e in reversed(events) if e["event"] == "checkpoint"), None)
    resumed = [e for e in events if e["event"] == "resume"]
    summary = {
        "name": run.name,
        "label": run.label,
        "method": str(run.method),
        "size": str(run.size),
        "seed": run.seed,
        "steps": total,
        "epochs": train[-1]["epochs"],
        "samples_seen": state["samples"],
        "seconds": state["seconds"],
        "pairs_per_s": state["samples"] / state["seconds"],
        "data_wait_fraction": state["wait_seconds"] / state["seconds"],
        "first_batch_s": [e["seconds"] for e in events if e["event"] == "first_batch"],
        "world_size": run.ray.workers,
        "restarts": len(resumed),
        "goodput": state["seconds"] / (trained - began) if began is not None and trained is not None else None,
        "lost_s": sum(e["lost_s"] for e in resumed),
        "down_s": sum(e.get("down_s", 0.0) for e in resumed),
        "best_step": state["best_step"],
        "skipped_steps": sum(line["skipped"] for line in train),
        "dropped": {r: sum(v == r for v in dropped.values()) for r in sorted(set(dropped.values()))},
        "losses": {
            name: _first_last(train, name)
            for name in run.objectives.active()
            if any(name in line["losses"] for line in train)
        },
        "eval": {
            task: with_intervals(result["metrics"], result.get("intervals", {})) for task, result in evaluation.items()
        },
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def _first_last(train: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Means of the first and last 5 % of the steps in which the objective was on."""
    values = [line["losses"][name] for line in train if name in line["losses"]]
    n = max(1, len(values) // 20)
    return {"first": fmean(values[:n]), "last": fmean(values[-n:])}

"""Fabricated folders of sweeps and comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from tests.report.conftest import write_lines

STEPS = 160
SPACE: dict[str, dict[str, Any]] = {
    "objectives.psl.weight": {"log": [2.0, 50.0]},
    "objectives.psl.heads_top_k": {"int": [2, 6]},
    "objectives.psl.min_attention": {"uniform": [0.0, 0.3]},
    "objectives.psl.recommend": {"choice": ["soft", "hard", "off"]},
    "objectives.psl.recommend_threshold": {"log": [0.02, 0.5], "when": {"objectives.psl.recommend": "hard"}},
    "objectives.psl.soft_alpha": {"uniform": [0.0, 0.6], "when": {"objectives.psl.recommend": ["soft", "hard"]}},
}
BASE = {
    "method": "simla",
    "objectives": {"psl": {"weight": 20.0, "heads_top_k": 4, "min_attention": 0.0, "recommend": "soft",
                           "recommend_threshold": 0.0, "soft_alpha": 0.2}},
}  # fmt: skip
#: Name's number -> (status, value, steps, reason); trial 0 is the base config.
TRIALS: list[tuple[str, float | None, int, str | None]] = [
    ("finished", 0.610, 160, None),
    ("finished", 0.583, 160, None),
    ("stopped", 0.312, 40, "below the better third at step 40"),
    ("finished", 0.655, 160, None),
    ("failed", None, 12, "ValueError: <b>boom</b> & more"),
    ("stopped", 0.298, 40, "below the better third at step 40"),
    ("timed_out", 0.401, 80, "more than 300 s"),
    ("finished", 0.634, 160, None),
]


def params_of(number: int) -> dict[str, Any]:
    if number == 0:
        own = dict(BASE["objectives"]["psl"])
        del own["recommend_threshold"]
        return {f"objectives.psl.{key}": value for key, value in own.items()}
    recommend = ("soft", "hard", "off")[number % 3]
    params: dict[str, Any] = {
        "objectives.psl.weight": round(2.0 * 1.45**number, 4),
        "objectives.psl.heads_top_k": 2 + number % 5,
        "objectives.psl.min_attention": 0.03 * number,
        "objectives.psl.recommend": recommend,
    }
    if recommend == "hard":
        params["objectives.psl.recommend_threshold"] = 0.02 * 1.4**number
    if recommend != "off":
        params["objectives.psl.soft_alpha"] = 0.07 * number
    return params


def difference(metric: str, a: float, b: float, half: float | None, seeds: int = 3) -> dict[str, Any]:
    mean = a - b
    return {
        "metric": metric, "a": a, "b": b, "std_a": 0.011, "std_b": 0.015, "mean": mean,
        "low": None if half is None else mean - half, "high": None if half is None else mean + half,
        "per_seed": [mean + 0.01 * (i - 1) for i in range(seeds)], "seeds": seeds, "images": 500,
    }  # fmt: skip


def sweep_summary(**changes: Any) -> dict[str, Any]:
    """The summary of a finished sweep with one objective."""
    trials = [
        {
            "number": i, "name": f"trial-{i:03d}", "params": params_of(i), "values": None, "value": value,
            "metrics": {} if value is None else {"retrieval_r10": value}, "status": status,
            "stopped_early": status == "stopped", "reason": reason, "steps": steps, "seconds": 0.5 * steps,
            "default": i == 0,
        }
        for i, (status, value, steps, reason) in enumerate(TRIALS)
    ]  # fmt: skip
    repeats = {
        "seeds": [1, 2, 3],
        **{
            which: [
                {"seed": seed, "name": f"{which}-seed{seed}",
                 "metrics": {"retrieval/itm/t2i_r10": level + 0.01 * seed, "keywords/ap": 0.8}}
                for seed in (1, 2, 3)
            ]
            for which, level in (("best", 0.60), ("default", 0.59))
        },
        "differences": [
            difference("retrieval/itm/t2i_r10", 0.62, 0.61, 0.025),
            difference("keywords/ap", 0.85, 0.80, 0.02),
            difference("words/color_right", 0.5, 0.5, None),
        ],
    }  # fmt: skip
    return {
        "kind": "sweep", "name": "psl-001", "study": "psl-001", "storage": None, "seconds": 812.0, "steps": STEPS,
        "rungs": [40, 80], "concurrent": 2, "objectives": [{"metric": "retrieval_r10", "name": "validation R@10"}],
        "space": SPACE, "trials": trials, "best": "trial-003", "front": [],
        "importance": {path: share for path, share in zip(SPACE, (0.4, 0.05, 0.1, 0.3, 0.05, 0.1), strict=True)},
        "repeats": repeats,
    } | changes  # fmt: skip


def pareto_summary() -> dict[str, Any]:
    """Two objectives: no rungs, nothing stopped, a front of two."""
    summary = sweep_summary(
        rungs=[], best=None, front=["trial-003", "trial-007"], repeats=None, importance=None,
        objectives=[{"metric": "retrieval/itc/t2i_r10", "name": "R@10 of ITC"},
                    {"metric": "keywords/ap", "name": "keyword AP"}],
    )  # fmt: skip
    for trial in summary["trials"]:
        value = trial["value"]
        if trial["status"] == "stopped":
            trial["status"], trial["stopped_early"], trial["reason"], trial["steps"] = "finished", False, None, STEPS
        trial["value"] = None
        if value is not None and trial["status"] == "finished":
            trial["values"] = [value, 0.95 if trial["name"] == "trial-007" else 1.2 - value]
    return summary


#: Entry -> (its compute, its level of R@10, what is not as published).
ENTRIES: dict[str, tuple[float, float, list[str]]] = {
    "clip": (0.4, 0.50, []),
    "albef": (0.8, 0.58, []),
    "simla": (1.0, 0.60, ["visual codes: 128 <kmeans> codes in place of DALL-E's 8192"]),
    "simla-no-psl": (0.95, 0.602, ["visual codes: 128 <kmeans> codes in place of DALL-E's 8192"]),
}
METRICS = ("retrieval/itm/t2i_r10", "retrieval/itm/i2t_r10", "grounding/pointing", "keywords/ap")


def comparison_summary(
    fractions: tuple[float, ...] = (1.0,), budgets: tuple[str, ...] = ("samples",)
) -> dict[str, Any]:
    """The summary of a comparison of four; one run of clip has failed, and clip knows no keywords."""
    rows, differences = [], []
    for budget in budgets:
        for fraction in fractions:
            for entry, (compute, level, fallbacks) in ENTRIES.items():
                seeds = (0, 1) if entry == "clip" else (0, 1, 2)
                steps = 400 if budget == "samples" else round(400 / compute)
                metrics = {}
                for i, metric in enumerate(METRICS):
                    if entry != "clip" or i < 2:
                        values = [level * fraction**0.3 + 0.02 * i + 0.01 * (seed - 1) for seed in seeds]
                        metrics[metric] = {"mean": sum(values) / len(values), "std": 0.01, "values": values}
                        gap = difference(metric, level, 0.6, 0.03)
                        if entry != "simla":
                            differences.append({"entry": entry, "budget": budget, "fraction": fraction} | gap)
                rows.append({
                    "entry": entry, "label": f"{entry}-tiny", "description": f"what <{entry}> is", "budget": budget,
                    "fraction": fraction, "steps": steps, "samples": 64 * steps, "gflops_per_pair": compute,
                    "compute": 1.0 if budget == "compute" else compute, "train_s": 150.0, "pairs_per_s": 170.6,
                    "runs": [run_name(entry, budget, fraction, seed) for seed in seeds],
                    "failed": [{"name": run_name(entry, budget, fraction, 2), "reason": "loss is <nan>"}]
                    if entry == "clip" else [],
                    "metrics": metrics, "fallbacks": fallbacks,
                    "overrides": {"objectives.psl": None} if entry == "simla-no-psl" else {},
                })  # fmt: skip
    return {
        "kind": "comparison", "name": "compare-001", "seconds": 1834.0, "seeds": [0, 1, 2], "reference": "simla",
        "rows": rows, "differences": differences,
    }  # fmt: skip


def run_name(entry: str, budget: str, fraction: float, seed: int) -> str:
    return f"{entry}-{budget}-{fraction:g}-seed{seed}"


def fabricate_comparison(folder: Path, summary: dict[str, Any] | None) -> Path:
    """Write a comparison's folder; without a summary that of one that was killed."""
    folder.mkdir(parents=True)
    (folder / "comparison.yaml").write_text("size: tiny\ncomparison: {seeds: [0, 1, 2]}\n")
    for row in (summary or comparison_summary())["rows"]:
        for i, run in enumerate(row["runs"]):
            write_run(folder / "runs" / run, row["steps"], ENTRIES[row["entry"]][1] + 0.01 * i)
            (folder / "runs" / run / "config.yaml").write_text(f"seed: {i}\n")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_run(folder: Path, steps: int, last: float, pages: bool = True) -> None:
    """What a study's page reads of a run: validations, and whether it has a page."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: simla\n")
    lines: list[dict[str, Any]] = [{"step": steps, "kind": "train", "losses": {"itc": 1.0}}]
    for step in range(20, steps + 1, 20):
        value = last * (1 - math.exp(-step / 50)) / (1 - math.exp(-steps / 50))
        lines.append({"step": step, "kind": "val", "metrics": {"retrieval_r10": value}})
    write_lines(folder / "metrics.jsonl", lines)
    if pages:
        (folder / "report.html").write_text("a page")


def fabricate_sweep(folder: Path, summary: dict[str, Any] | None) -> Path:
    """Write a sweep's folder; without a summary that of one that was killed."""
    folder.mkdir(parents=True)
    config = BASE | {"sweep": {"trials": 8, "space": SPACE}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for i, (status, value, steps, _) in enumerate(TRIALS):
        write_run(folder / f"trials/trial-{i:03d}", steps, value or 0.1, pages=status != "failed")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    for which in ("best", "default"):
        for seed in (1, 2, 3):
            write_run(folder / f"repeats/{which}-seed{seed}", STEPS, 0.6)
    return folder

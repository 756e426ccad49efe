"""A sweep's report.html, and its table on the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simla_ray.markup import Markup, join, tag
from simla_ray.markup.document import document
from simla_ray.report.folder import write_page
from simla_ray.report.overview import duration
from simla_ray.report.study import sweep_sections as sections
from simla_ray.report.study.folder import Study, read_study, yaml_value
from simla_ray.report.study.metrics import column_name, finding, has_interval, interval, outside_zero, points, shown
from simla_ray.report.study.sweep_figures import short
from simla_ray.report.study.tables import columns_that_fit, cut
from simla_ray.report.study.tiles import tile, tile_row
from simla_ray.report.study.trials import Trial, Trials
from simla_ray.report.terminal import WIDTH, aligned, clock

#: Widest status or value of a parameter on the terminal.
CELL = 16


def write_sweep_report(folder: Path) -> Path:
    """Write ``report.html`` into a sweep's folder: the same bytes for the same folder.

    A sweep that has not ended gets a partial page with a note.

    Raises:
        UserError: the folder is not that of a sweep.
    """
    return write_page(Path(folder), render(read_study(Path(folder), "sweep")))


def render(study: Study) -> str:
    """The page as text."""
    trials = Trials(study.summary)
    candidates = [
        sections.repeats_section(study, trials),
        sections.chosen_section(study, trials),
        sections.curves_section(study, trials),
        sections.parameters_section(study, trials),
        sections.trials_section(study, trials),
        sections.space_section(study),
    ]
    names = " and ".join(objective["name"] for objective in trials.objectives)
    top = tag(
        "header",
        tag("h1", study.name),
        tag("p", f"sweep for {names}", class_="label"),
        tag("p", sentence(study.summary), class_="lead"),
        _notes(study, trials),
        _tiles(study, trials),
    )
    return document(f"{study.name}: sweep", top, [section for section in candidates if section is not None])


def sentence(summary: Mapping[str, Any]) -> str:
    """What was swept, what became of the trials, and how long it took."""
    trials, space = Trials(summary), summary.get("space") or {}
    count = len(trials.every)
    text = f"{count} trial{'s' * (count != 1)}"
    if space:
        text += f" over {len(space)} parameter{'s' * (len(space) != 1)}"
    if summary.get("steps"):
        text += f", {summary['steps']:,} steps each at most"
    text += f": {trials.counts() or 'none begun'}."
    if summary.get("seconds") is not None:
        text += f" It took {duration(summary['seconds'])}"
        at_once = summary.get("concurrent")
        text += f" with {at_once} at a time." if at_once else "."
    if trials.pareto:
        text += " Two objectives: every trial runs to its end, and the best are those that no other beats in both."
    elif summary.get("rungs"):
        text += f" Trials that lag behind are stopped at step {', '.join(f'{rung:,}' for rung in summary['rungs'])}."
    if any(trial["status"] == "elsewhere" for trial in trials.every):
        text += f" Study {summary.get('study')} is fed by several clusters; their trials lie with them."
    return text


def sweep_table(summary: Mapping[str, Any]) -> str:
    """All trials by value, then the best beside the base config: at most 118 columns.

    Parameters stand in the order of their importance, as many as fit; failed trials follow with their reasons.
    """
    trials = Trials(summary)
    order = sorted(trials.every, key=lambda trial: _rank(trials, trial))
    head = ["trial", *(cut(column_name(o["metric"]), CELL) for o in trials.objectives), "status", "steps", "time"]
    rows = [head, *(_row(trials, trial) for trial in order)]
    importance = summary.get("importance") or {}
    space = sorted(summary.get("space") or {}, key=lambda path: -importance.get(path, 0.0))
    columns = [[short(path), *(_param(trial, path) for trial in order)] for path in space]
    kept = columns_that_fit(rows, columns)
    blocks = [textwrap.fill(f"{summary.get('name', '')}: {sentence(summary)}", WIDTH)]
    if order:
        blocks.append(aligned(kept))
    left = len(head) + len(space) - len(kept[0])
    if left and order:
        blocks[-1] += f"\n{left} more parameter{'s' * (left != 1)} in report.html"
    reasons = [f"{trial['name']} {trials.status(trial)}: {trial['reason']}" for trial in order if trial.get("reason")]
    if reasons:
        blocks.append("\n".join(cut(" ".join(reason.split()), WIDTH) for reason in reasons))
    blocks.append(textwrap.fill(_outcome(trials, summary), WIDTH))
    return "\n\n".join(block for block in blocks if block)


def _outcome(trials: Trials, summary: Mapping[str, Any]) -> str:
    """What the sweep has shown, in a sentence or two."""
    if not trials.best:
        return "No trial has finished." if not trials.finished else ""
    if trials.pareto:
        return f"On the Pareto front (*): {', '.join(trials.best)}."
    best = trials.by_name[trials.best[0]]
    metric = trials.objectives[0]["metric"]
    text = f"Best: {best['name']}, {shown(metric, trials.value(best))} on the validation set"
    if trials.default is not None and trials.default is not best:
        text += f"; the base config: {shown(metric, trials.value(trials.default))}{trials.base_so_far}"
    differences = (summary.get("repeats") or {}).get("differences")
    if not differences:
        return f"{text}. Not trained again with other seeds, so what is chance in it cannot be said."
    count = differences[0].get("seeds") or len(summary["repeats"]["seeds"])
    rival = summary["repeats"].get("trial") or best["name"]
    if rival != best["name"]:
        text += f". The base itself is the best, so {rival}, the best of the others, was held against it"
    text += f". Again with {count} fresh seed{'s' * (count != 1)} on the test set: "
    return text + finding(differences[0], rival, "the base config")


def _notes(study: Study, trials: Trials) -> Markup | None:
    found = []
    if not study.written or trials.running or study.summary.get("unfinished"):
        text = "This sweep has not ended: the page shows what had been written so far."
        if trials.running:
            text += f" {trials.running} trial{'s' * (trials.running != 1)} without an end."
        found.append(tag("p", tag("strong", "Unfinished. "), text, class_="warning"))
    elif not study.summary.get("repeats"):
        text = "The best trial was not trained again with other seeds: what is chance in it cannot be said."
        found.append(tag("p", tag("strong", "No repeats. "), text, class_="warning"))
    return join(found) if found else None


def _tiles(study: Study, trials: Trials) -> Markup | None:
    found = []
    for i, objective in enumerate(trials.objectives):
        metric = objective["metric"]
        there = [
            (value, name) for name in trials.best if (value := trials.value(trials.by_name.get(name), i)) is not None
        ]
        if not there:
            continue
        value, name = max(there)
        base = trials.value(trials.default, i)
        below = f"{name}; base config {shown(metric, base)}{trials.base_so_far}" if base is not None else name
        found.append(tile(f"Best {objective['name']}", shown(metric, value), below, value, base))
    repeats = study.summary.get("repeats") or {}
    for d in (repeats.get("differences") or [])[:1]:
        unit = "no interval"
        if has_interval(d):
            unit = f"points, 95 % {interval(d)}: {'excludes 0' if outside_zero(d) else 'holds 0, no gain is shown'}"
        found.append(
            tile(f"Best minus base, test set: {column_name(d['metric'])}", points(d["metric"], d["mean"]), unit)
        )
        if d.get("std_b") is not None:
            noise = f"points, base config over {len(repeats['default'])} seeds"
            found.append(tile("Seed noise", f"± {points(d['metric'], d['std_b'], sign=False)}", noise))
    return tile_row(found)


def _rank(trials: Trials, trial: Trial) -> tuple[float, str]:
    value = trials.value(trial)
    return (math.inf if value is None else -value, trial["name"])


def _row(trials: Trials, trial: Trial) -> list[str]:
    values = [shown(o["metric"], trials.value(trial, i)) for i, o in enumerate(trials.objectives)]
    seconds = trial.get("seconds")
    name = trial["name"] + "*" * (trial["name"] in trials.best) + " (base)" * bool(trial.get("default"))
    status = cut(trials.status(trial), CELL)
    return [cut(name, 2 * CELL), *values, status, f"{trial.get('steps') or 0:,}", clock(seconds) if seconds else "–"]


def _param(trial: Trial, path: str) -> str:
    return cut(yaml_value(trial["params"][path]), CELL) if path in trial["params"] else "unused"

"""The sections of a comparison's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simla_ray.config.load import read_yaml
from simla_ray.markup import join, table, tag
from simla_ray.markup.document import Section
from simla_ray.report.study import comparison_figures as figures
from simla_ray.report.study.folder import Study, card, yaml_value
from simla_ray.report.study.metrics import (
    Difference,
    by_chance,
    column_name,
    correlation,
    has_interval,
    interval,
    metric_name,
    outside_zero,
    points,
    shown,
    with_spread,
)
from simla_ray.report.study.rows import BUDGETS, Row, Rows
from simla_ray.report.terminal import clock, number

COSTS = ("steps", "samples", "GFLOPs per pair", "compute", "time", "pairs/s")


def table_section(rows: Rows) -> Section | None:
    """One row for each entry, budget and fraction: what it cost and what came of it."""
    if not rows.every:
        return None
    metrics = rows.metrics
    head = ["entry", *COSTS, "runs", *map(column_name, metrics)]
    lines = [
        [_entry(rows, row), *costs(row), f"{len(row['runs'])} of {len(rows.seeds)}",
         *(mean_of(row, metric) for metric in metrics)]
        for row in rows.every
    ]  # fmt: skip
    title = "Mean ± standard deviation over seeds; compute: training FLOPs over the reference's"
    return "table", "Side by side", table(head, lines, title, range(1, len(head)), "dense")


def _entry(rows: Rows, row: Row) -> Any:
    """The row's name over the label of its runs."""
    name = tag("strong" if row["entry"] == rows.reference else "span", rows.name(row))
    return join([name, tag("small", row.get("label"), class_="under")]) if row.get("label") else name


def costs(row: Row) -> list[str]:
    """Steps, samples, GFLOPs per pair, compute over the reference's, seconds of training, pairs per second."""
    gflops, compute, seconds, rate = (row.get(key) for key in ("gflops_per_pair", "compute", "train_s", "pairs_per_s"))
    return [
        f"{row['steps']:,}" if row.get("steps") is not None else "–",
        f"{row['samples']:,}" if row.get("samples") is not None else "–",
        number(gflops) if gflops is not None else "–",
        f"{compute:.2f}" if compute is not None else "–",
        clock(seconds) if seconds is not None else "–",
        f"{rate:,.0f}" if rate is not None else "–",
    ]


def mean_of(row: Row, metric: str) -> str:
    """Mean and spread of a metric in this row; a dash where it was not measured."""
    found = row["metrics"].get(metric)
    return "–" if found is None else with_spread(metric, found.get("mean"), found.get("std"))


def differences_section(rows: Rows) -> Section | None:
    """Every entry minus the reference, with intervals."""
    parts: list[Any] = []
    cards, lines, smaller, every = [], [], [], []
    for metric in rows.metrics:
        everything = rows.of(metric)
        found = [(name, d) for name, d in everything if rows.whole(d)]
        every += [d for _, d in everything]
        smaller += [_line(metric, name, d) for name, d in everything if not rows.whole(d)]
        if not found:
            continue
        title = f"{metric_name(metric)}: minus {rows.reference}"
        alt = "; ".join(f"{name} {points(metric, d['mean'])} ({interval(d)})" for name, d in found)
        cards.append(card(figures.difference_figure(metric, found, rows.reference), title, f"{title}: {alt}"))
        lines += [_line(metric, name, d) for name, d in found]
    if not cards:
        return None
    text = "A dot is an entry's mean minus the reference's, at the same budget and the same data; the line through it "
    text += (
        "is the 95 % interval: pictures by the bootstrap, seeds by Student's t, both paired. Small strokes are single "
    )
    text += "seeds. Filled: the "
    parts.append(tag("p", text + "interval excludes 0.", class_="lead"))
    parts.append(tag("div", *cards, class_="figures wide"))
    head = ("metric", "entry", "difference, points", "95 % interval", "marked", "of each seed")
    parts.append(table(head, lines, f"Differences to {rows.reference}", (2, 3, 5), "dense"))
    if smaller:
        inner = table(head, smaller, "On smaller shares of the data", (2, 3, 5), "dense", shown=False)
        parts.append(tag("details", tag("summary", "On smaller shares of the data"), inner))
    notes = [by_chance(every) or ""]
    if any(has_interval(d) and d.get("images") is None for d in every):
        notes.append("Where the runs were not measured on the same pictures an interval is over the seeds alone.")
    parts.append(tag("p", " ".join(filter(None, notes)), class_="note"))
    return "differences", f"Differences to {rows.reference}", join(parts)


def _line(metric: str, name: str, d: Difference) -> tuple[Any, ...]:
    sure = tag("span", "excludes 0", class_="yes") if outside_zero(d) else "–"
    each = ", ".join(points(metric, one) for one in d.get("per_seed") or []) or "–"
    return metric_name(metric), name, points(metric, d["mean"]), interval(d), sure, each


def cautions_section(rows: Rows) -> Section | None:
    """What the numbers above do not say, and the runs that failed."""
    if not rows.every:
        return None
    parts = [tag("ul", *(tag("li", text) for text in rows.cautions()))]
    if rows.failed:
        lines = [(run["name"], rows.name(row), run.get("reason") or "–") for row, run in rows.failed]
        parts.append(table(("run", "row", "why"), lines, "Runs that failed; they are in no mean"))
    return "cautions", "What this table does not say", join(parts)


def seeds_section(rows: Rows) -> Section | None:
    """The value of every seed, on the largest share of the data."""
    cards = []
    whole = [row for row in rows.every if rows.whole(row)]
    for metric in rows.metrics:
        found = [(rows.name(row), list(_values(row, metric))) for row in whole if _values(row, metric)]
        if found:
            alt = "; ".join(f"{name} {', '.join(shown(metric, one) for one in values)}" for name, values in found)
            title = metric_name(metric)
            cards.append(card(figures.strip_figure(metric, found), title, f"{title}, every seed: {alt}"))
    if not cards:
        return None
    text = "A dot for each seed, a stroke at their mean."
    return "seeds", "Every seed", join([tag("p", text, class_="lead"), tag("div", *cards, class_="figures wide")])


def data_section(rows: Rows) -> Section | None:
    """Metrics over the share of the training rows, where several were tried."""
    if len(rows.fractions) < 2:
        return None
    cards = []
    for metric in rows.metrics:
        lines = []
        for entry in rows.entries:
            of_entry = [row for row in _at_one_budget(rows) if row["entry"] == entry and _values(row, metric)]
            if len(of_entry) > 1:
                of_entry.sort(key=lambda row: row["fraction"])
                seeds = min(len(_values(row, metric)) for row in of_entry)
                points_of = [[(row["fraction"], _values(row, metric)[i]) for row in of_entry] for i in range(seeds)]
                lines.append(figures.Line(entry, rows.entries.index(entry), points_of))
        if lines:
            title = f"{metric_name(metric)} over the data"
            said = []
            for row in rows.every:
                if _values(row, metric):
                    said.append(f"{rows.name(row)} {mean_of(row, metric)}")
            cards.append(card(figures.data_figure(metric, lines), title, f"{title}: {'; '.join(said)}"))
    if not cards:
        return None
    text = "Each line the mean of an entry, its band from the least to the most of its seeds. Smaller shares lie "
    lead = tag("p", text + "inside larger ones.", class_="lead")
    return "data", "Data efficiency", join([lead, tag("div", *cards, class_="figures wide")])


def curves_section(study: Study, rows: Rows) -> Section | None:
    """Validation R@10 on the way, over steps and over compute, on all of the data."""
    metric, cards = "retrieval_r10", []
    for over, budget in (("step", "samples"), ("compute, 1: the reference's whole training", "compute")):
        lines = []
        for row in _at_one_budget(rows, budget):
            if not rows.whole(row):
                continue
            if over != "step" and not (row.get("compute") and row.get("steps")):
                continue
            per_step = 1 if over == "step" else row["compute"] / row["steps"]
            seeds = [study.validation(f"runs/{run}", metric) for run in row["runs"]]
            seeds = [[(step * per_step, value) for step, value in points_of] for points_of in seeds if points_of]
            if seeds and set.intersection(*({x for x, _ in points_of} for points_of in seeds)):
                lines.append(figures.Line(row["entry"], rows.entries.index(row["entry"]), seeds))
        if lines:
            title = f"{metric_name(metric)} over {'steps' if over == 'step' else 'compute'}"
            alt = f"{title}: {', '.join(line.entry for line in lines)}"
            cards.append(card(figures.curve_figure(metric, lines, over), title, alt))
    if not cards:
        return None
    text = "Mean and range over seeds. Compute is spread evenly over a run's steps, although phases cost differently."
    return "curves", "Learning curves", join([tag("p", text, class_="lead"), tag("div", *cards, class_="figures wide")])


def details_section(study: Study, rows: Rows) -> Section | None:
    """Every run with its own numbers, and what makes each entry; without a summary the runs that are there."""
    if not rows.every:
        there = [
            (study.link(f"runs/{run['name']}", run["name"]), run["status"], f"{run['steps']:,}")
            for run in study.summary.get("trials") or []
        ]
        return ("details", "Runs", table(("run", "status", "steps"), there, "Runs so far", (2,))) if there else None
    metrics = rows.metrics
    lines = []
    for row in rows.every:
        for i, run in enumerate(row["runs"]):
            values = (_values(row, metric) for metric in metrics)
            cells = (
                shown(metric, found[i]) if len(found) == len(row["runs"]) else "–"  # else no telling whose they are
                for metric, found in zip(metrics, values, strict=True)
            )
            lines.append([study.link(f"runs/{run}", run), rows.name(row), _seed(study, run), *cells])
    head = ["run", "row", "seed", *map(column_name, metrics)]
    parts = [table(head, lines, "Run by run", range(2, len(head)), "dense")]
    entries = {row["entry"]: row for row in reversed(rows.every)}
    made = [
        (entry, entries[entry].get("description") or "–", _overrides(entries[entry]),
         "; ".join(entries[entry].get("fallbacks") or []) or "–")
        for entry in rows.entries
    ]  # fmt: skip
    parts.append(table(("entry", "what it is", "keys it sets", "not as published"), made, "Entries"))
    if study.config_text:
        text = tag("pre", study.config_text, tabindex="0")
        parts.append(tag("details", tag("summary", "The whole comparison.yaml"), text))
    return "details", "Run by run", join(parts)


def headline_tiles(rows: Rows) -> list[tuple[str, str, str]]:
    """(name, number, below) of the best mean of each of the first metrics, at equal samples on all data."""
    found = []
    at_once = {row["entry"]: rows.name(row) for row in _at_one_budget(rows) if rows.whole(row)}
    for metric in rows.metrics[:4]:
        differences = dict(rows.of(metric))
        means = [
            (row["metrics"][metric]["mean"], row["entry"])
            for row in _at_one_budget(rows)
            if rows.whole(row) and row["metrics"].get(metric, {}).get("mean") is not None
        ]
        if len(means) > 1:
            (first, name), (second, other) = sorted(means, reverse=True)[:2]
            gap = points(metric, first - second, sign=False)
            unit = "" if correlation(metric) else " points"
            below = f"{name}; {gap}{unit} before {other}"
            d = differences.get(at_once[other if name == rows.reference else name])
            if d is not None and rows.reference in (name, other) and has_interval(d):
                below += ", the interval excludes 0" if outside_zero(d) else ", the interval holds 0"
            found.append((column_name(metric), shown(metric, first), below))
    return found


def _at_one_budget(rows: Rows, wanted: str = "samples") -> list[Row]:
    """The rows of this budget, or of the one there is."""
    there = [budget for budget in BUDGETS if any(row["budget"] == budget for row in rows.every)]
    budget = wanted if wanted in there else next(iter(there), None)
    return [row for row in rows.every if row["budget"] == budget]


def _values(row: Row, metric: str) -> Sequence[float]:
    return (row["metrics"].get(metric) or {}).get("values") or []


def _seed(study: Study, run: str) -> str:
    config = study.folder / "runs" / run / "config.yaml"
    return str(read_yaml(config).get("seed", "–")) if config.is_file() else "–"


def _overrides(row: Row) -> Any:
    given = [tag("code", f"{path}={yaml_value(value)}") for path, value in (row.get("overrides") or {}).items()]
    return join(given, " ") if given else "–"

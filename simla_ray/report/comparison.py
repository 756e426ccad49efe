"""A comparison's report.html, and its table on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simla_ray.markup import Markup, tag
from simla_ray.markup.document import document
from simla_ray.report.folder import write_page
from simla_ray.report.overview import duration
from simla_ray.report.study import comparison_sections as sections
from simla_ray.report.study.folder import Study, read_study
from simla_ray.report.study.metrics import by_chance, column_name, has_interval, interval, outside_zero, points
from simla_ray.report.study.rows import BUDGETS, Rows
from simla_ray.report.study.tables import cut, in_parts
from simla_ray.report.study.tiles import tile, tile_row
from simla_ray.report.terminal import WIDTH

#: Widest name of a row on the terminal.
NAME = 44


def write_comparison_report(folder: Path) -> Path:
    """Write ``report.html`` into a comparison's folder: the same bytes for the same folder.

    A comparison that has not ended gets a partial page with a note.

    Raises:
        UserError: the folder is not that of a comparison.
    """
    return write_page(Path(folder), render(read_study(Path(folder), "comparison")))


def render(study: Study) -> str:
    """The page as text."""
    rows = Rows(study.summary)
    candidates = [
        sections.table_section(rows),
        sections.differences_section(rows),
        sections.cautions_section(rows),
        sections.seeds_section(rows),
        sections.data_section(rows),
        sections.curves_section(study, rows),
        sections.details_section(study, rows),
    ]
    tiles = [tile(*found) for found in sections.headline_tiles(rows)]
    top = tag(
        "header",
        tag("h1", study.name),
        tag("p", f"comparison with {rows.reference}" if rows.reference else "comparison", class_="label"),
        tag("p", sentence(study.summary), class_="lead"),
        _notes(study, rows),
        tile_row(tiles),
    )
    return document(f"{study.name}: comparison", top, [section for section in candidates if section is not None])


def sentence(summary: Mapping[str, Any]) -> str:
    """What was compared and how long it took."""
    rows = Rows(summary)
    entries, seeds = len(rows.entries), len(rows.seeds)
    budgets = [BUDGETS[budget] for budget in BUDGETS if any(row["budget"] == budget for row in rows.every)]
    text = f"{entries} entr{'y' if entries == 1 else 'ies'}"
    text += f" with seed{'s' * (seeds != 1)} {', '.join(map(str, rows.seeds))}" if seeds else ""
    text += f" at {' and at '.join(budgets)}" if budgets else ""
    text += f", on {len(rows.fractions)} shares of the data" if len(rows.fractions) > 1 else ""
    text += f": {len(rows.runs)} finished run{'s' * (len(rows.runs) != 1)}"
    if rows.failed:
        text += f", {len(rows.failed)} failed"
    if rows.missing:
        text += f", {rows.missing} still to come"
    if summary.get("seconds") is not None:
        text += f", in {duration(summary['seconds'])}"
    return text + "."


def comparison_table(summary: Mapping[str, Any]) -> str:
    """Costs, results and differences to the reference: tables of at most 118 columns, then what they do not say."""
    rows = Rows(summary)
    blocks = [textwrap.fill(f"{summary.get('name', '')}: {sentence(summary)}", WIDTH)]
    if rows.every:
        names = ["entry", *(cut(rows.name(row), NAME) for row in rows.every)]
        per_row = [sections.costs(row) for row in rows.every]
        runs = [f"{len(row['runs'])}/{len(rows.seeds)}" for row in rows.every]
        costs = zip(sections.COSTS, *per_row, strict=True)
        blocks += in_parts(names, [*costs, ["runs", *runs]])
        columns = [
            [column_name(metric), *(sections.mean_of(row, metric) for row in rows.every)] for metric in rows.metrics
        ]
        blocks += in_parts(names, columns)
        blocks += _differences(rows)
    for row, run in rows.failed:
        reason = " ".join(str(run.get("reason") or "no reason known").split())
        blocks.append(cut(f"failed: {run['name']} ({rows.name(row)}): {reason}", WIDTH))
    if rows.every:
        blocks.append("\n".join(textwrap.fill(f"- {text}", WIDTH, subsequent_indent="  ") for text in rows.cautions()))
    return "\n\n".join(blocks)


def _differences(rows: Rows) -> list[str]:
    """Points and intervals of every row that is not the reference's, a star where the interval excludes 0."""
    of = {metric: dict(rows.of(metric)) for metric in rows.metrics}
    lines = [rows.name(row) for row in rows.every if any(rows.name(row) in found for found in of.values())]
    if not lines:
        return []
    columns = []
    for metric, found in of.items():
        cells = []
        for name in lines:
            d = found.get(name)
            text = "–" if d is None else points(metric, d["mean"])
            if d is not None and has_interval(d):
                text += f" ({interval(d)}){'*' if outside_zero(d) else ''}"
            cells.append(text)
        columns.append([column_name(metric), *cells])
    tables = in_parts([f"minus {rows.reference}", *(cut(name, NAME) for name in lines)], columns)
    note = "Points with 95 % intervals; * the interval excludes 0."
    chance = by_chance([d for found in of.values() for d in found.values()])
    return [*tables, textwrap.fill(f"{note} {chance or ''}".strip(), WIDTH)]


def _notes(study: Study, rows: Rows) -> Markup | None:
    if study.written and rows.every and not rows.missing:
        return None
    text = "This comparison has not ended: "
    text += f"{rows.missing} runs are still to come." if rows.every else "there is no table yet."
    return tag("p", tag("strong", "Unfinished. "), text, class_="warning")

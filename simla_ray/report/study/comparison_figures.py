"""Figures of a comparison: differences with intervals, values of single seeds, curves over data, steps, compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from simla_ray.report.figures import FAINT, INK, Points, arrays, canvas, svg
from simla_ray.report.study.metrics import Difference, correlation, outside_zero

# Okabe and Ito's, as in the figures of a run; more entries than colours get other dashes and markers.
COLORS = ("#0072B2", "#C44E00", "#008060", "#B0568A", "#A87900", "#5B3FA0", "#24292f", "#4F9FC8")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.2)))
MARKERS = "osD^vPX*"
#: Markers on a curve, about.
MARKS = 8


@dataclass(frozen=True)
class Line:
    """An entry's curve: the points of each of its seeds. ``place`` among all entries gives its look in every figure."""

    entry: str
    place: int
    seeds: Sequence[Points]


def difference_figure(metric: str, rows: Sequence[tuple[str, Difference]], reference: str) -> str:
    """A dot and its interval for each (row's name, difference); filled where the interval excludes 0."""
    scale = 1 if correlation(metric) else 100
    with canvas(5.6, 0.9 + 0.32 * len(rows)) as (figure, axes):
        ax = axes[0, 0]
        for place, (_, d) in enumerate(rows):
            color = COLORS[0] if outside_zero(d) else FAINT
            per_seed = [scale * one for one in d.get("per_seed") or []]
            ax.plot(per_seed, [place + 0.22] * len(per_seed), "|", color=FAINT, ms=5, alpha=0.8)
            if d.get("low") is not None and d.get("high") is not None:
                ax.plot([scale * d["low"], scale * d["high"]], [place, place], color=color, lw=1.8)
            ax.plot(scale * d["mean"], place, "o", ms=6, mec=color, mfc=color if outside_zero(d) else "white", mew=1.4)
        ax.axvline(0, color=INK, lw=1.0)
        _name_rows(ax, [name for name, _ in rows])
        ax.set_xlabel(f"{'' if correlation(metric) else 'points, '}minus {reference}", color=FAINT)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    return svg(figure, f"differences-{metric}")


def strip_figure(metric: str, rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """The value of each seed as a dot for each (row's name, values), their mean as an upright line."""
    with canvas(5.6, 0.7 + 0.32 * len(rows)) as (figure, axes):
        ax = axes[0, 0]
        for place, (_, values) in enumerate(rows):
            ax.plot(values, [place] * len(values), "o", ms=5, color=COLORS[0], alpha=0.6, mew=0)
            if len(values):
                ax.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=INK, lw=1.6)
        _name_rows(ax, [name for name, _ in rows])
        ax.xaxis.set_major_locator(MaxNLocator(5))
        _in_per_cent(ax.xaxis, metric)
    return svg(figure, f"seeds-{metric}")


def data_figure(metric: str, lines: Sequence[Line]) -> str:
    """Metric over the fraction of the training rows: the mean of each entry, with a band from least to most.

    The points of a seed are (fraction, value).
    """
    with canvas(5.6, 3.5) as (figure, axes):
        ax = axes[0, 0]
        ax.set_xscale("log", base=2)
        _draw(ax, lines)
        fractions = sorted({x for line in lines for points in line.seeds for x, _ in points})
        ax.set_xticks(fractions, [fraction_name(x) for x in fractions])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("share of the training rows", color=FAINT)
        _in_per_cent(ax.yaxis, metric)
        _legend(ax, lines)
    return svg(figure, f"data-{metric}")


def curve_figure(metric: str, lines: Sequence[Line], over: str) -> str:
    """A validation metric over steps or over compute, a line with a band for each entry."""
    with canvas(5.6, 3.5) as (figure, axes):
        ax = axes[0, 0]
        _draw(ax, lines)
        ax.set_xlim(0)
        ax.set_xlabel(over, color=FAINT)
        ax.xaxis.set_major_locator(MaxNLocator(6))
        if over == "step":
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _in_per_cent(ax.yaxis, metric)
        _legend(ax, lines)
    return svg(figure, f"curves-{metric}-{over}")


def fraction_name(fraction: float) -> str:
    """``1/8``, ``all``; a share that is no such fraction in per cent."""
    if fraction == 1:
        return "all"
    parts = round(1 / fraction)
    return f"1/{parts}" if abs(parts * fraction - 1) < 1e-6 else f"{100 * fraction:g} %"


def _draw(ax: Axes, lines: Sequence[Line]) -> None:
    for line in lines:
        look = _look(line.place)
        grid, values = _over_seeds(line.seeds)
        if len(line.seeds) > 1:
            ax.fill_between(grid, values.min(0), values.max(0), color=look["color"], alpha=0.14, lw=0)
        ax.plot(grid, values.mean(0), lw=1.7, ms=4, markevery=max(1, len(grid) // MARKS), **look)


def _over_seeds(seeds: Sequence[Points]) -> tuple[np.ndarray, np.ndarray]:
    """Places that all seeds have, and their values there (seeds, places)."""
    lines = [arrays(points) for points in seeds]
    grid = np.array(sorted(set.intersection(*(set(places) for places, _ in lines))))
    return grid, np.stack([np.interp(grid, places, values) for places, values in lines])


def _look(i: int) -> Mapping[str, Any]:
    n = len(COLORS)
    return {"color": COLORS[i % n], "ls": DASHES[i // n % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}


def _legend(ax: Axes, lines: Sequence[Line]) -> None:
    handles = [Line2D([], [], label=line.entry, lw=1.7, ms=4, **_look(line.place)) for line in lines]
    ax.legend(handles=handles, fontsize=8, loc="lower right", handlelength=2.2, ncols=1 + (len(lines) > 6))


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")


def _in_per_cent(axis: Any, metric: str) -> None:
    if not correlation(metric):
        form: Callable[[float, Any], str] = PercentFormatter(1, decimals=None)
        axis.set_major_formatter(form)

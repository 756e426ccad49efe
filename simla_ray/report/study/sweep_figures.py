"""Figures of a sweep: learning curves of all trials, importance, parallel coordinates, the Pareto front."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from simla_ray.report.figures import FAINT, INK, Points, arrays, canvas, svg
from simla_ray.report.study.folder import yaml_value
from simla_ray.report.study.metrics import correlation

BEST, FINISHED, BROKEN, BASE = "#C44E00", "#0072B2", "#B0568A", INK
#: Height of the level "unused" of a parameter whose condition does not hold, below its axis from 0 to 1.
OFF = -0.16
#: Colours of values on parallel coordinates: viridis without the yellow that vanishes on a light ground.
SHADES = matplotlib.colormaps["viridis"]
LIGHTEST = 0.86
#: Inches of the widest figure, at which its letters are still read on a page; letters of a line over an axis.
WIDEST, NARROW = 11.0, 12
#: Choices beyond which labels on an axis are thinned.
MANY_CHOICES = 9


@dataclass(frozen=True)
class Curve:
    """A trial's validation metric over its steps. ``status`` as in the summary, or "best" or "default"."""

    name: str
    status: str
    points: Points


def learning_curves(curves: Sequence[Curve], rungs: Sequence[int], metric: str) -> str:
    """Metric over steps of all trials; a cross where one was stopped, dotted lines where it could have been."""
    looks: dict[str, dict[str, Any]] = {
        "stopped": {"color": FAINT, "lw": 0.9, "alpha": 0.6},
        "broken": {"color": BROKEN, "lw": 1.0, "alpha": 0.9},
        "running": {"color": FINISHED, "lw": 1.0, "alpha": 0.6, "ls": (0, (2, 1.5))},
        "finished": {"color": FINISHED, "lw": 1.1, "alpha": 0.6},
        "default": {"color": BASE, "lw": 1.6, "ls": (0, (5, 2))},
        "best": {"color": BEST, "lw": 2.2},
    }
    titles = {"broken": "failed or timed out", "default": "base config"}
    kinds = {curve.name: curve.status if curve.status in looks else "broken" for curve in curves}
    with canvas(9.6, 3.5) as (figure, axes):
        ax = axes[0, 0]
        for kind in looks:  # what matters lies on top
            for curve in (c for c in curves if kinds[c.name] == kind):
                ax.plot(*arrays(curve.points), **looks[kind])
                if kind in ("stopped", "broken"):
                    end = curve.points[-1]
                    ax.plot(*end, marker="x", ms=5, color=looks[kind]["color"], alpha=0.9)
        for i, rung in enumerate(rungs):
            ax.axvline(rung, color=FAINT, lw=0.9, ls=(0, (1, 1.5)), zorder=1, label="rung" if i == 0 else None)
        there = [kind for kind in reversed(looks) if kind in kinds.values()]
        lines = [Line2D([], [], label=titles.get(kind, kind), **looks[kind]) for kind in there]
        if rungs:
            lines.append(Line2D([], [], color=FAINT, lw=0.9, ls=(0, (1, 1.5)), label="rung"))
        ax.legend(handles=lines, fontsize=8, loc="lower right", handlelength=1.8)
        _in_per_cent(ax.yaxis, metric)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlim(0)
        ax.set_xlabel("step", color=FAINT)
    return svg(figure, f"sweep-{metric}")


def importance_bars(importance: Mapping[str, float]) -> str:
    """A bar for the share of each parameter, the largest on top."""
    rows = sorted(importance.items(), key=lambda item: (item[1], item[0]))
    with canvas(5.6, max(1.4, 0.5 + 0.27 * len(rows))) as (figure, axes):
        ax = axes[0, 0]
        places = np.arange(len(rows))
        ax.barh(places, [share for _, share in rows], color=FINISHED, height=0.62)
        for place, (_, share) in zip(places, rows, strict=True):
            ax.annotate(f"{100 * share:.0f} %", (share, place), (4, 0), textcoords="offset points", va="center",
                        fontsize=8, color=FAINT)  # fmt: skip
        ax.set_yticks(places, [short(path) for path, _ in rows])
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 1.12 * max([share for _, share in rows] + [1e-9]))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.xaxis.set_major_locator(MaxNLocator(5))
    return svg(figure, "importance")


def parallel_coordinates(
    space: Mapping[str, Mapping[str, Any]],
    trials: Sequence[Mapping[str, Any]],
    values: Mapping[str, float],
    best: Sequence[str],
    metric: str,
) -> str:
    """One line for each trial over one axis for each parameter, coloured by value; grey without one.

    Args:
        trials: with ``name``, ``number`` and ``params``.
        values: name -> value, of the trials that have one.
        best: names of those drawn bold.
    """
    least, most = min(values.values(), default=0.0), max(values.values(), default=1.0)
    with canvas(min(WIDEST, max(6.0, 1.05 * (len(space) + 1))), 4.2) as (figure, axes):
        ax = axes[0, 0]
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
        for x, (path, entry) in enumerate(space.items()):
            _axis(ax, x, short(path), *_ticks(entry), off=any(path not in trial["params"] for trial in trials))
        spread = most - least or 1.0
        if values:
            ends = [(0.0, _number(metric, least)), (1.0, _number(metric, most))]
            _axis(ax, len(space), "value", ends[: 1 + (most > least)], "")
        for trial in sorted(trials, key=lambda t: (values.get(t["name"], -math.inf), t["number"])):
            heights = [_height(path, entry, trial) for path, entry in space.items()]
            value = values.get(trial["name"])
            look: dict[str, Any] = {"color": FAINT, "lw": 0.8, "ls": (0, (2, 2)), "alpha": 0.6}
            if value is not None:
                heights.append((value - least) / spread)
                look = {"color": SHADES(LIGHTEST * (value - least) / spread), "lw": 1.2, "alpha": 0.85}
            if trial["name"] in best:
                look = {"color": BEST, "lw": 2.6}
            ax.plot(range(len(heights)), heights, marker="o", ms=3 if trial["name"] not in best else 4.5, **look)
        ax.set_xlim(-0.35, len(space) + 0.45)
        ax.set_ylim(OFF - 0.08, 1.2)
        ax.set_xticks([])
        ax.set_yticks([])
    return svg(figure, "parallel")


def pareto_front(points: Mapping[str, tuple[float, float]], front: Sequence[str], base: str | None,
                 metrics: Sequence[str], names: Sequence[str]) -> str:  # fmt: skip
    """Both objectives of every trial; those that no other beats in both are joined and named."""
    with canvas(5.6, 3.9) as (figure, axes):
        ax = axes[0, 0]
        other = [name for name in points if name not in front]
        ax.plot([points[n][0] for n in other], [points[n][1] for n in other], "o", color=FINISHED, ms=5, alpha=0.55,
                label="other trials")  # fmt: skip
        best = sorted((name for name in front if name in points), key=lambda name: points[name])
        ax.plot([points[n][0] for n in best], [points[n][1] for n in best], color=BEST, lw=1.0, marker="D", ms=6,
                drawstyle="steps-pre", label="Pareto front")  # fmt: skip
        for name in best:
            ax.annotate(name, points[name], (5, 5), textcoords="offset points", fontsize=7.5, color=INK)
        if base is not None and base in points:
            ax.plot(*points[base], "s", ms=10, mfc="none", mec=BASE, mew=1.4, label="base config")
        ax.set_xlabel(names[0])
        ax.set_ylabel(names[1])
        ax.margins(0.12)
        for axis, metric in zip((ax.xaxis, ax.yaxis), metrics, strict=True):
            _in_per_cent(axis, metric)
        ax.legend(fontsize=8)
    return svg(figure, "pareto")


def short(path: str) -> str:
    """A key without the section that most swept keys share."""
    return path.removeprefix("objectives.")


def _axis(ax: Axes, x: float, title: str, ticks: Sequence[tuple[float, str]], kind: str, off: bool = False) -> None:
    ax.plot([x, x], [0, 1], color=FAINT, lw=1.0, zorder=1)
    ax.annotate(_in_lines(title), (x, 1), (0, 16), textcoords="offset points", ha="center", va="bottom",
                fontsize=7.5, color=INK)  # fmt: skip
    if kind:
        ax.annotate(kind, (x, 1), (0, 6), textcoords="offset points", ha="center", fontsize=6.5, color=FAINT)
    for height, label in [*ticks, *([(OFF, "unused")] if off else [])]:
        ax.plot([x - 0.03, x + 0.03], [height, height], color=FAINT, lw=0.8, zorder=1)
        ground = {"boxstyle": "round,pad=0.1", "fc": "#f2f4f6", "ec": "none", "alpha": 0.75}
        ax.annotate(label, (x, height), (5, 0), textcoords="offset points", va="center", fontsize=7, color=FAINT,
                    bbox=ground, zorder=5)  # fmt: skip


def _in_lines(title: str) -> str:
    """A key broken after dots and underscores where it would reach into the next axis."""
    words = title.replace(".", ". ").replace("_", "_ ")
    return "\n".join(line.replace(" ", "") for line in textwrap.wrap(words, NARROW))


def _ticks(entry: Mapping[str, Any]) -> tuple[list[tuple[float, str]], str]:
    """(height, label) on the axis of a parameter, and its scale where it is not the plain one."""
    if "choice" in entry:
        choices = entry["choice"]
        every = -(-len(choices) // MANY_CHOICES)
        labels = [(i / max(1, len(choices) - 1), yaml_value(value)) for i, value in enumerate(choices)]
        return labels[::every], "choice"
    if "log" in entry:
        low, high = entry["log"]
        middle = math.sqrt(low * high)
        return [(0.0, yaml_value(low)), (0.5, f"{middle:.2g}"), (1.0, yaml_value(high))], "log"
    low, high = entry["int"] if "int" in entry else entry["uniform"]
    return [(0.0, yaml_value(low)), (1.0, yaml_value(high))], ""


def _height(path: str, entry: Mapping[str, Any], trial: Mapping[str, Any]) -> float:
    """Where a trial crosses an axis; trials with the same choice lie side by side."""
    beside = 0.05 * (trial["number"] * 0.618034 % 1 - 0.5)
    if path not in trial["params"]:
        return OFF + beside
    value = trial["params"][path]
    if "choice" in entry:
        choices = entry["choice"]
        return choices.index(value) / max(1, len(choices) - 1) + beside if value in choices else OFF + beside
    low, high = next(entry[kind] for kind in ("log", "int", "uniform") if kind in entry)
    if "log" in entry:
        low, high, value = math.log(low), math.log(high), math.log(max(value, low * 1e-3))
    return float(np.clip((value - low) / (high - low or 1), -0.05, 1.05)) + (beside if "int" in entry else 0)


def _number(metric: str, value: float) -> str:
    return f"{value:.3f}" if correlation(metric) else f"{100 * value:.1f} %"


def _in_per_cent(axis: Any, metric: str) -> None:
    if not correlation(metric):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))

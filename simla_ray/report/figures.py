"""The figures of a report: curves as SVG, heat maps as JPEG, both as data URIs and the same for the same run."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image

from simla_ray.markup import data_uri

# Okabe and Ito's colours, which stay apart for colour-blind readers; the yellow ones darkened for a light ground.
COLORS = {"itc": "#0072B2", "itm": "#C44E00", "mlm": "#008060", "mim": "#B0568A", "psl": "#A87900"}
MARKERS = {"itc": "o", "itm": "s", "mlm": "^", "mim": "D", "psl": "v"}
INK, FAINT = "#24292f", "#6b737c"
#: Points drawn of a curve; longer runs are thinned.
MAX_POINTS = 500
HEAT_PX = 256

STYLE = {
    "font.size": 9, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT,
    "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#d9dde2", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "axes.linewidth": 0.8, "svg.fonttype": "none", "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Band:
    """What runs that differ only in the seed have shown: their mean, least and most at some steps."""

    name: str
    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Frame:
    """What all curves of a run share: the last step of the axis, phase changes and restarts."""

    total_steps: int
    phases: Sequence[int] = ()
    restarts: Sequence[int] = ()


def loss_curve(frame: Frame, name: str, train: Points, val: Points, band: Band | None = None) -> str:
    """Training loss of each step (faint) and smoothed, with the validation loss against the true targets.

    The band, that of smoothed training losses, lies beneath.
    """
    with _panel(frame) as (figure, ax):
        beneath = _draw_band(ax, band)
        steps, values = arrays(train)
        smooth = smoothed(values)
        color = COLORS.get(name, INK)
        if len(steps):
            every = max(1, len(steps) // MAX_POINTS)
            ax.plot(steps[::every], values[::every], color=color, alpha=0.28, lw=0.7)
            ax.plot(steps[::every], smooth[::every], color=color, lw=1.8, label="training, smoothed")
        if val:
            ax.plot(*arrays(val), color=INK, lw=1.1, ls=(0, (4, 2)), marker="o", ms=3.5, label="validation")
        _fit_height(ax, values, smooth, arrays(val)[1], *beneath)
        _legend(ax)
    return svg(figure, f"loss-{name}")


def retrieval_curve(frame: Frame, val: Points, chance: float | None, band: Band | None = None) -> str:
    """Validation R@10 over the steps."""
    with _panel(frame) as (figure, ax):
        beneath = _draw_band(ax, band)
        ax.plot(*arrays(val), color=COLORS["itc"], lw=1.8, marker="o", ms=4, label="R@10")
        if chance is not None:
            ax.axhline(chance, color=FAINT, lw=1, ls=(0, (1, 2)), label="chance")
        most = max([v for _, v in val] + [float(line.max()) for line in beneath])
        ax.set_ylim(0, min(1.0, most * 1.2 + 0.02))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend(ax, "lower right")
    return svg(figure, "retrieval")


def accuracy_curves(frame: Frame, curves: dict[str, Points]) -> str:
    """Validation accuracy of every objective that has one."""
    with _panel(frame) as (figure, ax):
        for name, val in curves.items():
            ax.plot(*arrays(val), color=COLORS.get(name, INK), lw=1.5, marker=MARKERS.get(name, "o"), ms=4, label=name)
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend(ax, "upper left", columns=2)
    return svg(figure, "accuracy")


def rate_curve(frame: Frame, rate: Points) -> str:
    """Learning rate over the steps."""
    with _panel(frame) as (figure, ax):
        ax.plot(*arrays(_thinned(rate)), color=COLORS["mlm"], lw=1.8)
        ax.set_ylim(0)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    return svg(figure, "lr")


def speed_curve(frame: Frame, rate: Points, wait: Points) -> str:
    """Pairs per second, and below it the share of the time in which the step waits for data."""
    rate, wait = _thinned(rate), _thinned(wait)
    with _panel(frame, rows=2) as (figure, axes):
        top, bottom = axes
        top.plot(*arrays(rate), color=COLORS["itc"], lw=1.4)
        top.set_ylim(0, max((v for _, v in rate), default=1) * 1.15)
        top.set_ylabel("pairs/s")
        bottom.fill_between(*arrays(wait), color=COLORS["itm"], alpha=0.35, lw=0)
        bottom.plot(*arrays(wait), color=COLORS["itm"], lw=1.2)
        bottom.set_ylim(0, max(0.1, max((v for _, v in wait), default=0) * 1.15))
        bottom.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bottom.set_ylabel("data wait")
    return svg(figure, "speed")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a thirtieth of the curve, centred so that it does not lag; cut off at both ends.

    What is not finite is left out; NaN where nothing is left.
    """
    good = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    place, half = np.arange(len(values)), len(values) // 60
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    n = count[high] - count[low]
    return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def heat_picture(raw: bytes, heat: Sequence[Sequence[float]]) -> str:
    """The picture in grey with the heat map over it: brighter and more opaque is hotter."""
    with Image.open(io.BytesIO(raw)) as opened:
        image = opened.convert("RGB")
    scale = HEAT_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    out = io.BytesIO()
    heat_over(image.resize(size, Image.Resampling.LANCZOS), heat).save(out, "JPEG", quality=86)
    return data_uri(out.getvalue(), "image/jpeg")


def heat_over(image: Image.Image, heat: Sequence[Sequence[float]] | np.ndarray) -> Image.Image:
    """An RGB picture in grey with the heat map (g, g) over it, at the picture's size."""
    base = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.9
    map_ = np.asarray(heat, dtype=np.float32)
    grid = Image.fromarray(map_ / max(float(map_.max()), 1e-9))
    heat_hw = np.clip(np.asarray(grid.resize(image.size, Image.Resampling.BICUBIC)), 0, 1)
    over = matplotlib.colormaps["inferno"](0.4 + 0.55 * heat_hw)[..., :3] * 255
    alpha = 0.8 * heat_hw[..., None]
    return Image.fromarray((base * (1 - alpha) + over * alpha).astype(np.uint8))


@contextmanager
def canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure of so many inches in the report's style, with its axes (rows, columns)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots(rows, columns, squeeze=False)


@contextmanager
def _panel(frame: Frame, rows: int = 1) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.1, 2.75))
        axes = figure.subplots(rows, 1, sharex=True)
        yield figure, axes
        every = [axes] if rows == 1 else list(axes)
        for ax in every:
            ax.set_xlim(0, max(1, frame.total_steps))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            _mark(ax, frame, labelled=ax is every[0])
        every[-1].set_xlabel("step", color=FAINT)


def _draw_band(ax: Axes, band: Band | None) -> Sequence[np.ndarray]:
    """Draw the band beneath what comes; its lower and upper end, nothing without one."""
    if band is None:
        return ()
    steps, low, high = (np.asarray(values, dtype=float) for values in (band.steps, band.low, band.high))
    ax.fill_between(steps, low, high, color=FAINT, alpha=0.28, lw=0, label=band.name)
    ax.plot(steps, band.mean, color=FAINT, lw=0.9)
    return low, high


def _mark(ax: Axes, frame: Frame, labelled: bool) -> None:
    """Dotted lines at phase changes, dashed ones at restarts, with their labels above and inside the axes."""
    style = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "color": FAINT, "fontsize": 7.5}
    for number, step in enumerate(frame.phases, start=2):
        ax.axvline(step, color=FAINT, lw=0.9, ls=(0, (1, 1.5)), zorder=1)
        if labelled:
            ax.annotate(f"phase {number}", (step, 1), (0, 2), ha="center", va="bottom", **style)
    for i, step in enumerate(frame.restarts):
        ax.axvline(step, color=FAINT, lw=0.9, ls=(0, (6, 3)), zorder=1)
        if labelled and i < 3:  # more labels than that would hide the curve
            ax.annotate("restart", (step, 0), (-2, 4), ha="right", va="bottom", rotation=90, **style)


def _fit_height(ax: Axes, raw: np.ndarray, *lines: np.ndarray) -> None:
    """Limits from the curves that matter: single outliers of the raw loss do not flatten the rest."""
    parts = [line[np.isfinite(line)] for line in lines]
    finite = raw[np.isfinite(raw)]
    if len(finite):
        parts.append(np.quantile(finite, [0.005, 0.995]))
    values = np.concatenate(parts)
    if len(values):
        margin = 0.06 * (values.max() - values.min()) or 0.1 * abs(values.max()) or 1
        ax.set_ylim(values.min() - margin, values.max() + margin)


def _legend(ax: Axes, place: str = "upper right", columns: int = 1) -> None:
    ax.legend(loc=place, fontsize=8, ncols=columns, handlelength=1.8, borderaxespad=0.2)


def _thinned(points: Points) -> Points:
    return points[:: max(1, len(points) // MAX_POINTS)]


def arrays(points: Points) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s for s, _ in points], dtype=float), np.array([v for _, v in points], dtype=float)


def svg(figure: Figure, name: str) -> str:
    """The figure as a data URI, without the date, and with the reader's own sans-serif for its text."""
    out = io.StringIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata=silent)
    text = re.sub(r'font-family: [^;"]+', "font-family: system-ui, sans-serif", out.getvalue())
    return data_uri(text[text.index("<svg") :].encode(), "image/svg+xml")

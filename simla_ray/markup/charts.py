"""Counts as bars: columns over neighbouring values, and lines of a ranking. Inline, so that they follow the colours."""

from __future__ import annotations

from collections.abc import Sequence

from simla_ray.markup import Markup, join, tag

WIDTH, HEIGHT = 360, 150
TOP, FOOT = 18, 20
#: Labels under the columns.
TICKS = 6
#: Widest column, in the drawing's units.
WIDEST = 40
#: Lines of a ranking beyond which it is set in two columns.
MANY_LINES = 10


def columns(title: str, bars: Sequence[tuple[str, str, int]], note: str = "") -> Markup:
    """A figure with a column for each (label below, label when pointed at, count)."""
    most = max((n for _, _, n in bars), default=0)
    step = WIDTH / max(1, len(bars))
    every = -(-len(bars) // TICKS)
    floor = HEIGHT - FOOT
    parts = [tag("text", f"{most:,}", x=0, y=TOP - 6), tag("line", x1=0, x2=WIDTH, y1=TOP, y2=TOP, class_="grid")]
    for i, (label, pointed, n) in enumerate(bars):
        tall = (floor - TOP) * n / max(1, most)
        wide = min(0.84 * step, WIDEST)
        x, y = f"{(i + 0.5) * step - wide / 2:.1f}", f"{floor - tall:.1f}"
        # The whole height can be pointed at, also above a low column.
        hit = tag("rect", x=f"{i * step:.1f}", y=TOP, width=f"{step:.1f}", height=floor - TOP, class_="hit")
        column = tag("rect", x=x, y=y, width=f"{wide:.1f}", height=f"{tall:.1f}", class_="column")
        parts.append(tag("g", tag("title", f"{pointed}: {n:,}"), hit, column))
        if i % every == 0:
            parts.append(tag("text", label, x=f"{(i + 0.5) * step:.1f}", y=HEIGHT - 5, class_="middle"))
    parts.append(tag("line", x1=0, x2=WIDTH, y1=floor, y2=floor, class_="ground"))
    # Labels of the outer columns reach over the edges.
    drawing = tag("svg", *parts, viewBox=f"-14 0 {WIDTH + 28} {HEIGHT}", role="img", aria_label=f"{title}. {note}")
    caption = tag("figcaption", title, tag("span", note, class_="aside") if note else None)
    return tag("figure", caption, drawing, class_="chart")


def ranking(title: str, lines: Sequence[tuple[str, int]], note: str = "") -> Markup:
    """A figure with a bar for each (label, count), as they come; many of them in two columns."""
    most = max((n for _, n in lines), default=0)
    half = -(-len(lines) // 2) if len(lines) > MANY_LINES else max(1, len(lines))
    parts = [_ranked(lines[i : i + half], most) for i in range(0, len(lines), half)]
    caption = tag("figcaption", title, tag("span", note, class_="aside") if note else None)
    inner = tag("div", *parts, class_="halves") if len(parts) > 1 else join(parts)
    return tag("figure", caption, inner, class_="chart")


def _ranked(lines: Sequence[tuple[str, int]], most: int) -> Markup:
    rows = [
        tag(
            "tr",
            tag("th", label, scope="row"),
            tag("td", _bar(n / max(1, most))),
            tag("td", f"{n:,}", class_="number"),
        )
        for label, n in lines
    ]
    return tag("table", tag("tbody", *rows), class_="ranking")


def _bar(share: float) -> Markup:
    return tag("span", tag("span", class_="value", style=f"width:{100 * share:.1f}%"), class_="bar")

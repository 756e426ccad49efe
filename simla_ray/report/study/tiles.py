"""Headline numbers of a study."""

from __future__ import annotations

from collections.abc import Sequence

from simla_ray.markup import Markup, tag


def tile(name: str, big: str, below: str, value: float | None = None, tick: float | None = None) -> Markup:
    """A number under its name; ``value`` in 0..1 draws a bar with a tick at ``tick``."""
    bar = tag("span", aria_hidden="true")
    if value is not None:
        parts = [tag("i", class_="value", style=f"width:{_per_cent(value):.1f}%")]
        if tick is not None:
            parts.append(tag("i", class_="tick", style=f"left:{_per_cent(tick):.1f}%"))
        bar = tag("span", *parts, class_="bar", aria_hidden="true")
    return tag(
        "div",
        tag("span", name, class_="name"),
        tag("span", big, class_="big"),
        bar,
        tag("span", below, class_="below"),
        class_="tile",
    )


def tile_row(tiles: Sequence[Markup]) -> Markup | None:
    """The tiles beside each other; None without any."""
    return tag("div", *tiles, class_="tiles") if tiles else None


def _per_cent(value: float) -> float:
    return 100 * min(1.0, max(0.0, value)) if value == value else 0.0

"""Scenes of the built-in world: two to four objects, what can be said of them, and whether it is true.

A scene is a list of objects {shape, color, size, box}; no two share shape and colour. A box is [x1, y1, x2, y2] as
shares of the image side, in 0..1, y downwards; boxes do not overlap.
"""

import json
import math
from typing import Any

import numpy as np

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 25, 30),
    "green": (20, 140, 45),
    "blue": (35, 60, 215),
    "yellow": (250, 220, 30),
    "pink": (255, 100, 190),
    "cyan": (40, 215, 225),
    "white": (252, 252, 252),
    "black": (12, 12, 12),
}
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
# Centres must differ by this share of the image side for a relation to be said or to count as true. It is below the
# smallest distance that two objects can have along the axis that separates them, so any two objects have a relation.
RELATION_MARGIN = 0.15
_EXTENTS: dict[str, tuple[float, float]] = {"small": (0.24, 0.28), "large": (0.36, 0.42)}


def satisfies(claims: str, scene: str) -> bool:
    """Whether a scene makes a caption true: its names can be given to different objects that stand as it says.

    `claims` is one entry of a row's `claims`, `scene` the `scene` of the same or another row.
    """
    said, objects = json.loads(claims), json.loads(scene)
    fitting = [[k for k, obj in enumerate(objects) if fits(named, obj)] for named in said["objects"]]

    def assign(chosen: list[int]) -> bool:
        if len(chosen) == len(fitting):
            return all(
                holds(relation, objects[chosen[a]]["box"], objects[chosen[b]]["box"])
                for a, relation, b in said["relations"]
            )
        return any(assign([*chosen, k]) for k in fitting[len(chosen)] if k not in chosen)

    return all(fitting) and assign([])


def fits(said: dict[str, str], obj: dict[str, Any]) -> bool:
    """Whether an object has all the attributes said."""
    return all(obj[key] == value for key, value in said.items())


def holds(relation: str, a: list[float], b: list[float]) -> bool:
    """Whether the centre of box `a` lies to `relation` of that of box `b`, by the margin."""
    return offset(relation, a, b) >= RELATION_MARGIN


def offset(relation: str, a: list[float], b: list[float]) -> float:
    """How far the centre of box `a` lies to `relation` of that of box `b`, as a share of the image side."""
    dx = (a[0] + a[2] - b[0] - b[2]) / 2
    dy = (a[1] + a[3] - b[1] - b[3]) / 2
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation]


def draw_scene(rng: np.random.Generator, px: int) -> tuple[list[dict[str, Any]], list[tuple[int, int, int]]]:
    """The objects of a scene, and (left, top, side) of each in whole pixels."""
    n = int(np.searchsorted((0.15, 0.55), rng.random(), side="right")) + 2
    kinds = rng.permutation(len(SHAPES) * len(COLORS))[:n].tolist()
    sizes = [SIZES[k] for k in rng.integers(len(SIZES), size=n).tolist()]
    sides = []
    for size in sizes:
        low, high = _EXTENTS[size]
        sides.append(int(rng.integers(math.ceil(low * px), math.floor(high * px), endpoint=True)))
    corners = _place(rng, sides, px)
    colors = list(COLORS)
    objects = [
        {
            "shape": SHAPES[kind % len(SHAPES)],
            "color": colors[kind // len(SHAPES)],
            "size": size,
            "box": [round(v / px, 6) for v in (x, y, x + side, y + side)],
        }
        for kind, size, (x, y, side) in zip(kinds, sizes, corners, strict=True)
    ]
    return objects, corners


def _place(rng: np.random.Generator, sides: list[int], px: int) -> list[tuple[int, int, int]]:
    """Free places for squares of the given sides, at least a gap apart, as (left, top, side)."""
    gap = max(1, round(0.02 * px))
    for _ in range(6):
        placed: list[tuple[int, int, int]] = []
        for side in sides:
            for x, y in rng.integers(0, px - side, endpoint=True, size=(24, 2)).tolist():
                if all(
                    x + side + gap <= u or u + s + gap <= x or y + side + gap <= v or v + s + gap <= y
                    for u, v, s in placed
                ):
                    placed.append((x, y, side))
                    break
            else:
                break
        if len(placed) == len(sides):
            return placed
    # Several large objects seldom find room by chance; a quarter of the image holds any one of them.
    half = px // 2
    placed = []
    for side, cell in zip(sides, rng.permutation(4).tolist(), strict=False):
        dx, dy = rng.integers(0, max(0, half - side - gap), endpoint=True, size=2).tolist()
        placed.append((cell % 2 * half + dx, cell // 2 * half + dy, side))
    return placed

"""What a controlled comparison holds equal over all methods: pictures, towers, steps, batch and optimiser.

What is left to a method are its fusion and its objectives, with the teacher, queue, temperature and schedule that are
theirs. A method's stacks are those of the shared towers: one that has a single stack has it as deep as the tower it is
made of (ViLT's is the image tower's Vision Transformer, as published: 12 layers, where others have 12 + 12), and is not
given the layers of the tower that it does without. What that costs or saves stands in the table, as compute.

Boxes follow a crop and a flip of their image, and no other turn. With an entry over boxes all entries see pictures that
were cropped and flipped alone, whatever the size would do beside that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simla_ray.config.enums import Augment, RegionSource, VisionSource

#: The augmentation that every method can take.
FOR_ALL = Augment.crop
#: Keys and sections that are the same for all entries.
HELD = (
    "size", "init_from", "precision", "joint_width", "world", "data", "vision", "text", "batch", "optim", "eval",
)  # fmt: skip
#: Keys of them that say where words and patches meet, or which validation a method has.
OF_FUSION = ("vision.source", "text.fusion", "text.concepts", "eval.best")
#: Keys of them that a method may set to nothing: it has no text tower.
MAY_BE_WITHOUT = ("text.depth", "text.weights")
NOTE = (
    "Controlled: data, towers, steps, batch and optimiser are the same for all entries. Fusion and objectives differ, "
    "with teacher, queue, temperature and schedule."
)


def is_held(path: str, value: Any) -> bool:
    """Whether a method or an entry may not set this key to this value."""
    if path in OF_FUSION or (path in MAY_BE_WITHOUT and not value):
        return False
    return path in HELD or path.partition(".")[0] in HELD


def is_over_boxes(tree: Mapping[str, Any]) -> bool:
    """Whether a run of this tree, presets included, has images made of boxes; so one may that looks what its rows
    have."""
    vision, regions = (tree[name] if isinstance(tree.get(name), Mapping) else {} for name in ("vision", "regions"))
    return vision.get("source") == VisionSource.regions and regions.get("source") != RegionSource.grid


def unheld(layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A preset without the keys that are held."""
    left: dict[str, Any] = {}
    for name, value in layer.items():
        if isinstance(value, Mapping) and value:
            if inner := unheld(value, f"{prefix}{name}."):
                left[name] = inner
        elif not is_held(f"{prefix}{name}", value):
            left[name] = value
    return left

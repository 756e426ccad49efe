"""Where the regions of a sample lie: boxes of the row under its view, or cells of a grid. Features: see
``models.regions``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from simla_ray.config.schema import RegionSource, Run
from simla_ray.data.decode import DropRow
from simla_ray.data.masking import mask_regions

#: A box of which a crop leaves less than this share is not in the view.
LEFT_OVER = 0.25
WHOLE = (0.0, 0.0, 1.0, 1.0)
#: Source -> the columns that it reads.
COLUMNS = {RegionSource.column: ("boxes", "region_feats"), RegionSource.boxes: ("boxes",), RegionSource.grid: ()}


def region_columns(run: Run) -> tuple[str, ...]:
    """Columns of the row that the regions of a run, and their classes, come from; its source is decided."""
    if run.regions is None:
        return ()
    return COLUMNS[run.regions.source] + (("box_labels",) if run.regions.classes is not None else ())


def grid_boxes(side: int) -> np.ndarray:
    """(side^2, 4) float32 cells, row-major, x1, y1, x2, y2 in 0..1."""
    at = np.arange(side, dtype=np.float32) / side
    y, x = (a.ravel() for a in np.meshgrid(at, at, indexing="ij"))
    return np.stack([x, y, x + np.float32(1 / side), y + np.float32(1 / side)], 1).clip(0, 1)


def follow(boxes: np.ndarray, crop: np.ndarray, flipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of an image as they lie in a view of it.

    Args:
        boxes: (n, 4) in shares of the image; crop: (4,) what the view shows of it, in the same.
        flipped: whether the view is mirrored.

    Returns:
        (n, 4) in shares of the view, cut at its edge; (n,) bool, whether ``LEFT_OVER`` of a box or more is in it.
    """
    origin, size = np.tile(crop[:2], 2), np.tile(crop[2:] - crop[:2], 2)
    moved = (boxes - origin) / size
    cut = moved.clip(0, 1)
    kept = _area(cut) >= LEFT_OVER * _area(moved)
    if flipped:
        cut = np.stack([1 - cut[:, 2], cut[:, 1], 1 - cut[:, 0], cut[:, 3]], 1)
    return cut, kept


def in_view(boxes: np.ndarray, crop: np.ndarray, flipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """The regions of a view by boxes: the view itself and what it shows of the boxes, the largest first.

    Args: see ``follow``.

    Returns:
        (n, 4) in shares of the view; (n,) which of the boxes each is, -1 for the view itself.
    """
    cut, kept = follow(boxes, crop, flipped)
    cut = np.concatenate([np.array([WHOLE], np.float32), cut[kept]])
    order = np.argsort(-_area(cut), kind="stable")
    return cut[order], np.append(-1, np.flatnonzero(kept))[order]


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


class RegionMaker:
    """Regions of a run's samples, ``regions.max`` of them with padding.

    A column's features are those of the whole image, so its view must be the whole image, too.
    """

    def __init__(self, run: Run):
        assert run.regions is not None and run.regions.source is not RegionSource.auto
        self.hides = bool({"mrfr", "mrc", "mrckl"} & set(run.objectives.active()))
        self.regions, self.source = run.regions, run.regions.source
        self.cells = grid_boxes(run.regions.grid)
        self.number = {name: i for i, name in enumerate(run.regions.classes or (), 1)}

    @property
    def whole_view(self) -> bool:
        """Whether the view may not be cropped or mirrored."""
        return self.source is RegionSource.column

    def __call__(self, row: Mapping[str, Any], crop: np.ndarray, flipped: bool) -> dict[str, np.ndarray]:
        """``region_boxes`` (max, 4) float32, ``n_regions``, of a column ``regions`` (max, width) float32, and with
        ``regions.classes`` ``region_class`` (max,) int64, 0 for background.

        Args:
            crop, flipped: as ``follow`` takes them.

        Raises:
            DropRow: boxes_missing, boxes_unreadable, box_labels_unlike_boxes, region_feats_missing,
                region_feats_unlike_boxes, region_feats_unreadable, region_feats_width.
        """
        if self.source is RegionSource.grid:
            return {"region_boxes": self.cells, "n_regions": np.int64(len(self.cells))}
        boxes = boxes_of(row)
        classes = self._classes(row, boxes)
        if self.source is RegionSource.column:
            return self._column(row, boxes) | self._padded_classes(classes)
        cut, which = (of_view[: self.regions.max] for of_view in in_view(boxes, crop, flipped))
        regions = {"region_boxes": _padded(cut, self.regions.max), "n_regions": np.int64(len(cut))}
        return regions | self._padded_classes(np.append(classes, 0)[which])  # at -1: background

    def _classes(self, row: Mapping[str, Any], boxes: np.ndarray) -> np.ndarray:
        """(n,) int64 class of each box: its label's number from 1 on, 0 for other labels."""
        if not self.number:
            return np.zeros(len(boxes), np.int64)
        labels = row.get("box_labels")
        if labels is None or len(labels) != len(boxes):
            raise DropRow("box_labels_unlike_boxes")
        return np.array([self.number.get(label, 0) for label in labels], np.int64)

    def _padded_classes(self, classes: np.ndarray) -> dict[str, np.ndarray]:
        if not self.number:
            return {}
        out = np.zeros(self.regions.max, np.int64)
        out[: len(classes)] = classes[: self.regions.max]
        return {"region_class": out}

    def hidden(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``region_hidden`` (max,) bool of a sample's regions; nothing where no objective reads it."""
        if not self.hides:
            return {}
        boxes, n = sample["region_boxes"], int(sample["n_regions"])
        overlaps = self.source is not RegionSource.column
        chosen = np.zeros(len(boxes), dtype=bool)
        chosen[:n] = mask_regions(boxes[:n], self.regions.mask_p, rng, overlaps=overlaps)
        return {"region_hidden": chosen}

    def _column(self, row: Mapping[str, Any], boxes: np.ndarray) -> dict[str, np.ndarray]:
        given, width = row.get("region_feats"), self.regions.width
        if not given:
            raise DropRow("region_feats_missing")
        if len(given) != len(boxes):
            raise DropRow("region_feats_unlike_boxes")
        given, most = given[: self.regions.max], self.regions.max
        if any(len(feature) != width for feature in given):
            raise DropRow("region_feats_width")
        features = np.array(given, dtype=np.float32)
        if not np.isfinite(features).all():
            raise DropRow("region_feats_unreadable")
        return {
            "region_boxes": _padded(boxes[:most], most),
            "regions": _padded(features, most),
            "n_regions": np.int64(len(features)),
        }


def boxes_of(row: Mapping[str, Any]) -> np.ndarray:
    """(n, 4) float32 boxes of a row, cut at the image's edge.

    Raises:
        DropRow: boxes_missing, boxes_unreadable.
    """
    if row.get("boxes") is None:
        raise DropRow("boxes_missing")
    boxes = np.array(row["boxes"], dtype=np.float32).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise DropRow("boxes_unreadable")
    boxes = boxes.clip(0, 1)
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        raise DropRow("boxes_unreadable")
    return boxes


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    out = np.zeros((length, values.shape[1]), dtype=np.float32)
    out[: len(values)] = values
    return out

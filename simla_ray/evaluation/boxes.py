"""Boxes on a picture: which can be used, how far they overlap, and which of them a heat map means.

A box is x1, y1, x2, y2 in shares of the picture's sides, 0..1, so that its picture's size plays no part. A heat map is
(g, g), one number per patch, rows from top to bottom; it is enlarged bicubically, as the official ``grounding_eval``
does, to cells of a fixed fineness.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

#: Cells along a side of the enlarged map, about.
CELLS = 48
#: Shares of a map's maximum above which its cells make a box; from high to low. Of the boxes of the built-in world's
#: validation set half the maximum found 0.66, 0.4 found 0.64, 0.3 0.52; whichever scores best found 0.58.
THRESHOLDS = (0.5, 0.35, 0.2)
#: What counts as found.
FOUND_IOU = 0.5
#: By how much a box may stand over the edge of its picture without being counted: annotations are in whole pixels.
EDGE = 0.005


def usable(boxes: Sequence[Sequence[float]]) -> tuple[np.ndarray, Counter[str]]:
    """Boxes (m, 4) float64 that can be used, cut at the edges of the picture, and what was wrong with how many.

    Counted: ``box_clipped``, kept; ``box_outside`` and ``box_without_area``, left out.
    """
    given = np.array([list(box) for box in boxes], dtype=np.float64).reshape(-1, 4)
    found = np.clip(given, 0, 1)
    given_area = (given[:, 2] > given[:, 0]) & (given[:, 3] > given[:, 1])
    area = (found[:, 2] > found[:, 0]) & (found[:, 3] > found[:, 1])
    cut = area & (np.abs(found - given).max(axis=1, initial=0) > EDGE)
    counts = {
        "box_clipped": int(cut.sum()),
        "box_outside": int((given_area & ~area).sum()),
        "box_without_area": int((~given_area).sum()),  # not a number compares as no area
    }
    return found[area], Counter({reason: n for reason, n in counts.items() if n})


def areas(boxes: np.ndarray) -> np.ndarray:
    """(..., 4) -> (...)"""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, 4) and (m, 4) -> (n, m) intersection over union; 0 where neither has an area.

    The official ``computeIoU`` counts pixels from edge to edge inclusive, a pixel more along either side.
    """
    a, b = first[:, None], second[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = np.clip(sides, 0, None).prod(axis=-1)
    union = areas(a) + areas(b) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def box_scores(heat: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """How well a map (g, g) fits each of the boxes (m, 4): the heat in a box over the root of its area -> (m,).

    The heat is a share of the map's; 1 is what the whole picture has of an even map. As the official ``grounding_eval``
    ranks candidates; it cuts boxes to whole pixels, and where no box of a picture scores above 0 it takes over the
    answer to the expression before.
    """
    total = heat.sum()
    if total <= 0:
        return np.zeros(len(boxes))
    across = _cumulative(boxes[:, 2], len(heat)) - _cumulative(boxes[:, 0], len(heat))
    down = _cumulative(boxes[:, 3], len(heat)) - _cumulative(boxes[:, 1], len(heat))
    inside = np.einsum("my,yx,mx->m", down, heat * (heat.size / total), across)
    area = areas(boxes)
    return np.divide(inside, np.sqrt(area), out=np.zeros(len(boxes)), where=area > 0)


def propose(heat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (k, 4) that a map (g, g) suggests by itself and their ``box_scores`` (k,): the best one, then wider ones.

    No two are equal; a map that is zero everywhere suggests none.
    """
    every = boxes_around_peak(heat[None])[0]
    _, first = np.unique(every, axis=0, return_index=True)
    boxes = every[[k for k in sorted(first) if areas(every[k]) > 0]]
    return boxes, box_scores(heat, boxes)


def boxes_around_peak(heats: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """Maps (n, g, g) -> (n, thresholds, 4), for each the tight box around what hangs together with the peak of the
    enlarged map by cells of at least that share of it; zeros for a map that is zero everywhere.

    Args:
        thresholds: from high to low.
    """
    fine = _enlarge(heats)
    n, side = len(fine), fine.shape[1]
    flat = fine.reshape(n, -1)
    peak = flat.max(axis=1, initial=0)
    part = np.zeros(flat.shape, bool)
    part[np.arange(n), flat.argmax(axis=1)] = peak > 0
    part = part.reshape(fine.shape)
    boxes = []
    for threshold in thresholds:
        part = _grown(part, fine >= threshold * peak[:, None, None])
        boxes.append(_around(part) / side)
    return np.stack(boxes, axis=1)


def _grown(part: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Parts (n, s, s) bool with all allowed cells that hang together with them, edge by edge."""
    part = part.copy()
    growing = np.arange(len(part))
    while len(growing):
        old = part[growing]
        new = old.copy()
        new[:, 1:] |= old[:, :-1]
        new[:, :-1] |= old[:, 1:]
        new[:, :, 1:] |= old[:, :, :-1]
        new[:, :, :-1] |= old[:, :, 1:]
        new &= allowed[growing]
        part[growing] = new
        growing = growing[(new != old).any(axis=(1, 2))]
    return part


def _around(part: np.ndarray) -> np.ndarray:
    """(n, s, s) bool -> (n, 4) first and last cells' edges; zeros around nothing."""
    edges = [_ends(part.any(axis=axis)) for axis in (1, 2)]
    (x1, x2), (y1, y2) = edges
    return np.stack([x1, y1, x2, y2], axis=1)


def _ends(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = line.any(axis=1)
    last = line.shape[1] - line[:, ::-1].argmax(axis=1)
    return line.argmax(axis=1) * there, last * there


def _enlarge(heats: np.ndarray) -> np.ndarray:
    matrix = _bicubic(heats.shape[-1])
    return np.asarray(matrix @ heats.astype(np.float64) @ matrix.T)


@functools.lru_cache(maxsize=8)
def _bicubic(grid: int) -> np.ndarray:
    """(cells, grid) what each patch of a line gives to each of its cells."""
    cells = grid * max(1, round(CELLS / grid))
    one = torch.eye(grid, dtype=torch.float64)[None, None]
    return F.interpolate(one, (cells, grid), mode="bicubic", align_corners=False)[0, 0].numpy()


def _cumulative(ends: np.ndarray, grid: int) -> np.ndarray:
    """(m,) ends of lines that begin at 0 -> (m, grid) what each patch gives to the mean over such a line, times its
    length; cells that an end lies in count in part.
    """
    matrix = _bicubic(grid)
    sums = np.concatenate([np.zeros((1, grid)), matrix.cumsum(axis=0)]) / len(matrix)
    place = np.clip(ends, 0, 1) * len(matrix)
    cell = np.minimum(place.astype(np.int64), len(matrix) - 1)
    share = (place - cell)[:, None]
    return sums[cell] * (1 - share) + sums[cell + 1] * share

"""k-means over image patches: the visual codes of MIM where no dVAE is at hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: (n, 3, px, px) uint8 -> (n, P, d) float32
Featurise = Callable[[np.ndarray], np.ndarray]

MAX_PATCHES = 200_000


def pixel_patches(images: np.ndarray, patch_px: int) -> np.ndarray:
    """(n, 3, px, px) uint8 -> (n, P, 3 * patch_px^2) float32 in 0..1, patches row-major."""
    n, channels, px, _ = images.shape
    side = px // patch_px
    patches = images.reshape(n, channels, side, patch_px, side, patch_px).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, side * side, -1).astype(np.float32) / 255


def kmeans(points: np.ndarray, k: int, iterations: int, seed: int) -> np.ndarray:
    """Lloyd's algorithm from k random points -> (k, d) float32 centroids.

    A centroid that loses all its points starts anew at one of the points farthest from their own centroids.

    Args:
        points: (n, d) float32. With fewer than k points some centroids repeat.
    """
    rng = np.random.default_rng([seed, 7])
    if len(points) > MAX_PATCHES:
        points = points[rng.choice(len(points), MAX_PATCHES, replace=False)]
    centroids = points[rng.choice(len(points), k, replace=len(points) < k)]
    squares = (points**2).sum(1)
    for _ in range(iterations):
        nearest, distance = _assign(points, squares, centroids)
        counts = np.bincount(nearest, minlength=k)
        sums = _sums(points, nearest, k)
        centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            centroids[empty] = points[np.argsort(-distance, kind="stable")[: len(empty)]]
    return centroids.astype(np.float32)


def spread_of(points: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared distance of points (n, d) to the nearest of centroids (k, d)."""
    distance = _assign(points, (points**2).sum(1), centroids)[1]
    return max(float(distance.mean(dtype=np.float64)), 1e-6)


def _assign(points: np.ndarray, squares: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    nearest = np.empty(len(points), dtype=np.int64)
    distance = np.empty(len(points), dtype=np.float32)
    for i in range(0, len(points), 8192):
        rows = slice(i, i + 8192)
        d = squares[rows, None] - 2 * points[rows] @ centroids.T + (centroids**2).sum(1)
        nearest[rows] = d.argmin(1)
        distance[rows] = d.min(1)
    return nearest, distance


def _sums(points: np.ndarray, nearest: np.ndarray, k: int) -> np.ndarray:
    """(k, d) sum of the points of each centroid."""
    order = np.argsort(nearest, kind="stable")
    sums = np.zeros((k, points.shape[1]), dtype=np.float32)
    found, starts = np.unique(nearest[order], return_index=True)
    sums[found] = np.add.reduceat(points[order], starts, axis=0)
    return sums

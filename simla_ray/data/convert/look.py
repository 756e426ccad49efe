"""Pictures that look alike: difference hashes and those that lie near each other."""

from __future__ import annotations

import numpy as np
from PIL import Image

from simla_ray.data.convert.survey import DIGEST

#: Bits of 128 in which two hashes may differ. Eight bands of 16 bits: seven different bits leave one of them equal.
NEAR_BITS = 7
_BANDS = 8
#: A picture with fewer changes than that is plain, and plain pictures look alike without being so.
PLAIN_BITS = 16
#: Pairs that are compared at a time.
_CHUNK = 2**20


def look(image: Image.Image) -> bytes:
    """16 bytes: whether brightness falls from each cell of an 8 by 8 grid to the next one to the right, and below."""
    grid = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), np.int16)
    right, below = grid[:8, :8] > grid[:8, 1:], grid[:8, :8] > grid[1:, :8]
    return np.packbits(np.concatenate([right.ravel(), below.ravel()])).tobytes()


def near(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(n, 2) positions of pairs, one of each, that look alike; of plain pictures none.

    Args:
        ours, theirs: looks, as ``as_digests`` gives them.
    """
    a, b = _bits(ours), _bits(theirs)
    keep_a, keep_b = np.flatnonzero(_busy(a)), np.flatnonzero(_busy(b))
    bands_a, bands_b = a[keep_a].view("<u2"), b[keep_b].view("<u2")
    found: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        order = np.argsort(bands_a[:, band], kind="stable")
        values = bands_a[order, band]
        low = np.searchsorted(values, bands_b[:, band], "left")
        counts = np.searchsorted(values, bands_b[:, band], "right") - low
        starts = np.cumsum(counts) - counts
        for first in range(0, int(counts.sum()), _CHUNK):
            pair = np.arange(first, min(first + _CHUNK, int(counts.sum())))
            j = np.searchsorted(starts + counts, pair, "right")
            i = order[low[j] + pair - starts[j]]
            i, j = keep_a[i], keep_b[j]
            close = np.bitwise_count(a[i] ^ b[j]).sum(axis=1) <= NEAR_BITS
            found.update(zip(i[close].tolist(), j[close].tolist(), strict=True))
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def _bits(looks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(looks).view(np.uint8).reshape(len(looks), DIGEST.itemsize)


def _busy(bits: np.ndarray) -> np.ndarray:
    return np.bitwise_count(bits).sum(axis=1) >= PLAIN_BITS

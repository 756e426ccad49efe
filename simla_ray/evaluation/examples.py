"""Which cases become the examples of a report, and their numbers as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

EXAMPLES = 12


def pick(good: Sequence[bool] | np.ndarray, n: int = EXAMPLES) -> list[int]:
    """At most n positions, half of them good ones where there are enough, spread evenly, in order."""
    flags = np.asarray(good, dtype=bool)
    right, wrong = np.flatnonzero(flags), np.flatnonzero(~flags)
    n_right = min(len(right), max(n // 2, n - len(wrong)))
    chosen = [*_spread(right, n_right), *_spread(wrong, min(len(wrong), n - n_right))]
    return sorted(int(i) for i in chosen)


def spread(count: int, n: int) -> np.ndarray:
    """At most n of 0..count-1, evenly spaced."""
    return _spread(np.arange(count), min(n, count))


def number(value: float) -> float | None:
    """Rounded to four decimals; None where JSON has no such number."""
    return round(float(value), 4) if math.isfinite(value) else None


def _spread(values: np.ndarray, n: int) -> np.ndarray:
    return values[np.arange(n) * len(values) // max(n, 1)]

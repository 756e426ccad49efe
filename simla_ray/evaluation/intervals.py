"""How far a metric moves with the images it was measured on: percentile intervals of the bootstrap (Efron 1979).

What is drawn with replacement are groups, as a rule images with all their captions: captions of one image are no
independent cases. A resample is the row of how often it has each group, so a mean is a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

RESAMPLES = 1000
#: Share of the resamples inside an interval.
LEVEL = 0.95
#: Numbers of a block of resamples, which bounds the memory.
CELLS = 2**21

#: Weights (r, n), how often each of n groups was drawn -> a metric (r,), or k of them (r, k); NaN where it has none.
Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap(statistic: Statistic, n: int) -> np.ndarray:
    """(2,) low and high end for a statistic of n groups; (k, 2) for k statistics.

    Resamples without a value are left out.
    """
    outside = 50 * (1 - LEVEL)
    return np.nanpercentile(resampled(statistic, n), [outside, 100 - outside], axis=0).T


def resampled(statistic: Statistic, n: int) -> np.ndarray:
    """(RESAMPLES,) values of a statistic of n groups; (RESAMPLES, k) of k statistics.

    The draws are fixed: the same n gives the same resamples.
    """
    rng = np.random.default_rng(0)
    rows = max(1, min(RESAMPLES, CELLS // n))
    values = []
    for start in range(0, RESAMPLES, rows):
        r = min(rows, RESAMPLES - start)
        drawn = rng.integers(0, n, (r, n)) + n * np.arange(r)[:, None]
        values.append(statistic(np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)))
    return np.concatenate(values)


def ratio_intervals(
    numerators: np.ndarray, denominators: np.ndarray, groups: np.ndarray | None = None
) -> list[list[float]]:
    """``[low, high]`` of k ratios sum(numerators) / sum(denominators), as of a mean over cases that groups have more
    or fewer of.

    Args:
        numerators: (n, k); denominators: (n,) or (n, k). Of cases.
        groups: (n,) the group of each case, any numbers; None: every case is its own.
    """
    numerators = np.asarray(numerators, np.float64)
    denominators = np.broadcast_to(np.asarray(denominators, np.float64).reshape(len(numerators), -1), numerators.shape)
    if groups is not None:
        _, place = np.unique(groups, return_inverse=True)
        numerators, denominators = (_summed(column, place) for column in (numerators, denominators))

    def ratio(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return weights @ numerators / (weights @ denominators)

    return bootstrap(ratio, len(numerators)).tolist()


def mean_intervals(values: Mapping[str, np.ndarray], groups: np.ndarray | None = None) -> dict[str, list[float]]:
    """``{name: [low, high]}`` of the means of cases' values (n,), truth values too; ``groups`` as above."""
    columns = np.stack([np.asarray(column, np.float64) for column in values.values()], axis=1)
    return dict(zip(values, ratio_intervals(columns, np.ones(len(columns)), groups), strict=True))


def mean_interval(values: np.ndarray, groups: np.ndarray | None = None) -> list[float]:
    """``[low, high]`` of a mean of cases' values (n,); ``groups`` as above."""
    return mean_intervals({"mean": values}, groups)["mean"]


def image_sums(
    values: Mapping[str, np.ndarray], images: int, owner: np.ndarray | None = None, totals: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """``{name: (images, 2) float32}``: of each image the sum of its cases' values, and of their totals.

    Args:
        values: of cases (n,), truth values too.
        owner: (n,) the image of each case; None: case i is of image i.
        totals: (n,) what the values are shares of; None: 1 each, so that the metric is their mean.
    """
    found = {}
    for name, column in values.items():
        places = np.arange(len(column)) if owner is None else owner
        both = (column, np.ones(len(column)) if totals is None else totals)
        found[name] = np.stack([np.bincount(places, part, images) for part in both], axis=1).astype(np.float32)
    return found


def _summed(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Values (n, k) of cases, summed over the groups at ``place`` (n,)."""
    return np.stack([np.bincount(place, column) for column in values.T], axis=1)

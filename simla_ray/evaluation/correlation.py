"""Rank correlation with ties, also of resamples: each gives a statistic of weights, see ``intervals``."""

from __future__ import annotations

import numpy as np

from simla_ray.evaluation.intervals import Statistic

#: Cases that are compared with all others at a time.
CASES = 256


def spearman(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Spearman's rho of cases (n,): Pearson's correlation of their ranks, equal values having their mean rank.

    NaN where a resample has one value only.
    """
    rank_x, rank_y = _Ties(x).ranks, _Ties(y).ranks

    def of_resamples(weights: np.ndarray) -> np.ndarray:
        n = weights.sum(1, keepdims=True)
        a, b = (ranks - (weights * ranks).sum(1, keepdims=True) / n for ranks in (rank_x(weights), rank_y(weights)))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights * a * b).sum(1) / np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))

    return of_resamples


def kendall_tau_b(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Kendall's tau-b of cases (n,): concordant less discordant pairs, over the geometric mean of the pairs that are
    no ties in x and of those that are none in y.

    The time grows with n squared, as one product of matrices. NaN where a resample has one value only.
    """
    ties = _Ties(x), _Ties(y)

    def of_resamples(weights: np.ndarray) -> np.ndarray:
        # Sums of whole numbers below 2**24, which float32 holds exactly.
        narrow, net = weights.astype(np.float32), np.zeros(len(weights))
        for start in range(0, len(x), CASES):
            here, later = slice(start, start + CASES), slice(start, None)
            signs = [np.sign(np.subtract.outer(t.group[here], t.group[later])) for t in ties]
            product = (signs[0] * signs[1]).astype(np.float32)
            product[:, CASES:] *= 2  # pairs within the block come in both orders already
            net += np.einsum("rn,rn->r", weights[:, here], narrow[:, later] @ product.T)
        n = weights.sum(1)
        # Every pair counts twice, here as in net.
        untied = [n**2 - (t.sizes(weights) ** 2).sum(1) for t in ties]
        with np.errstate(invalid="ignore", divide="ignore"):
            return net / np.sqrt(untied[0] * untied[1])

    return of_resamples


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """(n,) ranks from 1, equal values having their mean rank."""
    return _Ties(values).ranks(np.ones((1, len(values))))[0]


class _Ties:
    """Values (n,) as groups of equal ones in ascending order.

    ``group`` (n,) of each value; ``order`` (n,) that sorts them; ``first`` (groups,) where each group begins in it.
    """

    def __init__(self, values: np.ndarray):
        _, self.group, counts = np.unique(values, return_inverse=True, return_counts=True)
        self.order = np.argsort(self.group, kind="stable")
        self.first = np.cumsum(counts) - counts

    def sizes(self, weights: np.ndarray) -> np.ndarray:
        """Weights (r, n) of the values -> (r, groups)"""
        return np.add.reduceat(weights[:, self.order], self.first, axis=1)

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Weights (r, n) of the values -> (r, n) their ranks from 1"""
        sizes = self.sizes(weights)
        return (sizes.cumsum(1) - (sizes - 1) / 2)[:, self.group]

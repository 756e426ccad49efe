import time

import numpy as np
import pytest

from simla_ray.evaluation import correlation
from simla_ray.evaluation.correlation import kendall_tau_b, mean_ranks, spearman


def slow_tau_b(x, y):
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    net = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)
    untied = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    return net / np.sqrt(untied[0] * untied[1])


def slow_spearman(x, y):
    ranks = [
        [np.mean([1 + sum(w < v for w in values), sum(w <= v for w in values)]) for v in values] for values in (x, y)
    ]
    return np.corrcoef(*ranks)[0, 1]


@pytest.mark.parametrize(("fast", "slow"), [(spearman, slow_spearman), (kendall_tau_b, slow_tau_b)])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_against_a_loop_on_resamples_with_ties(fast, slow, levels, monkeypatch):
    monkeypatch.setattr(correlation, "CASES", 8)
    rng = np.random.default_rng(levels)
    x, y = rng.normal(size=30).round(1), rng.integers(0, levels, 30)
    y = y + (x > 0)
    weights = np.stack([np.ones(30), *(np.bincount(rng.integers(0, 30, 30), minlength=30) for _ in range(5))])
    for statistic, a, b in ((fast(x, y), x, y), (fast(y, x), y, x)):
        expected = [slow(np.repeat(a, row.astype(int)), np.repeat(b, row.astype(int))) for row in weights]
        assert statistic(weights) == pytest.approx(expected)


def test_by_hand():
    one = np.ones((1, 4))
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert kendall_tau_b(x, x**3)(one) == [1] and spearman(x, -x)(one) == pytest.approx([-1])
    # Of six pairs one is a tie in y, four are concordant, one is discordant: 3 / sqrt(6 * 5).
    assert kendall_tau_b(x, np.array([1, 3, 2, 3]))(one) == pytest.approx([3 / np.sqrt(30)])
    assert spearman(x, np.array([1, 2, 4, 3]))(one) == pytest.approx([0.8])
    assert mean_ranks(np.array([5.0, 2.0, 5.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_one_value_only_has_no_correlation():
    x = np.arange(3.0)
    for statistic in (spearman(x, np.ones(3)), kendall_tau_b(x, np.ones(3))):
        assert np.isnan(statistic(np.ones((2, 3)))).all()


def test_a_thousand_pairs_take_well_under_a_second():
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(size=1000), rng.integers(0, 10, 1000), np.ones((1000, 1000))
    began = time.process_time()
    spearman(x, y)(weights), kendall_tau_b(x, y)(weights)
    assert time.process_time() - began < 1

import time

import numpy as np
import pytest

from simla_ray.evaluation import intervals
from simla_ray.evaluation.intervals import bootstrap, mean_interval, mean_intervals, ratio_intervals


def slow_interval(statistic, cases_of_group):
    """Percentiles of a statistic of the cases of drawn groups, one resample after the other."""
    rng, n = np.random.default_rng(0), len(cases_of_group)
    found = []
    for _ in range(intervals.RESAMPLES):
        drawn = [case for g in rng.integers(0, n, n) for case in cases_of_group[g]]
        found.append(statistic(drawn))
    return [np.percentile(found, 2.5), np.percentile(found, 97.5)]


def test_mean_of_groups_against_a_loop():
    """Groups of one to six cases: the mean is a ratio, of sums that move together."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 7, 30)
    groups = np.repeat(np.arange(30), sizes)
    values = rng.random(len(groups)) + (sizes > 3)[groups]
    shuffled = rng.permutation(len(groups))
    expected = slow_interval(np.mean, [values[groups == g] for g in range(30)])
    assert mean_interval(values, groups) == pytest.approx(expected)
    assert mean_interval(values[shuffled], 7 + 3 * groups[shuffled]) == pytest.approx(expected)


def test_ratio_against_a_loop():
    rng = np.random.default_rng(2)
    total = rng.integers(1, 9, 25)
    right = rng.integers(0, total + 1)
    pairs = list(zip(right, total, strict=True))
    expected = slow_interval(lambda drawn: sum(a for a, _ in drawn) / sum(b for _, b in drawn), [[p] for p in pairs])
    (found,) = ratio_intervals(right[:, None], total)
    assert found == pytest.approx(expected)


def test_any_statistic_of_the_weights():
    values = np.random.default_rng(3).normal(size=21)

    def median(weights):
        return np.array([np.median(np.repeat(values, row.astype(int))) for row in weights])

    expected = slow_interval(np.median, [[v] for v in values])
    assert bootstrap(median, 21).tolist() == pytest.approx(expected)


def test_blocks_of_resamples_are_those_of_one_piece(monkeypatch):
    values = np.random.default_rng(4).random(50)
    whole = mean_interval(values)
    monkeypatch.setattr(intervals, "CELLS", 50 * 7)
    assert mean_interval(values) == whole


def test_nothing_varies_and_one_case():
    assert mean_interval(np.ones(9, bool)) == [1.0, 1.0]
    assert mean_interval(np.array([0.25])) == [0.25, 0.25]


def test_resamples_without_a_case_are_left_out():
    """One image of eight has words: a third of the resamples have none."""
    ((low, high),) = ratio_intervals(np.array([[3.0], *[[0.0]] * 7]), np.array([4.0] + [0.0] * 7))
    assert low == high == 0.75


def test_coverage():
    """95 % of the intervals hold the true mean: of independent cases, and of groups that vary together."""
    rng, trials = np.random.default_rng(5), 400
    hits = rng.random((200, trials)) < 0.3
    found = np.array(list(mean_intervals({str(t): hits[:, t] for t in range(trials)}).values()))
    inside = (found[:, 0] <= 0.3) & (found[:, 1] >= 0.3)
    assert 0.92 <= inside.mean() <= 0.98
    groups = np.repeat(np.arange(150), 5)
    share = rng.beta(0.3, 0.7, (150, trials))
    values = {str(t): rng.random(750) < share[groups, t] for t in range(trials)}

    def coverage(groups):
        low, high = np.array(list(mean_intervals(values, groups).values())).T
        return ((low <= 0.3) & (high >= 0.3)).mean()

    assert 0.92 <= coverage(groups) <= 0.98
    assert coverage(None) < 0.8, "captions of one image taken for independent cases promise too much"


def test_the_width_is_that_of_the_standard_error():
    hits = np.arange(1000) % 5 == 0
    low, high = mean_interval(hits)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 1000), rel=0.08)


def test_a_thousand_images_take_well_under_a_second():
    values = {str(i): np.random.default_rng(i).random(5000) for i in range(6)}
    began = time.process_time()
    mean_intervals(values, np.repeat(np.arange(1000), 5))
    assert time.process_time() - began < 1

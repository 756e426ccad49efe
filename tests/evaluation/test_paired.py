"""Differences of paired runs: against a slow loop and numbers by hand, and how often the interval holds the truth."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from simla_ray.errors import UserError
from simla_ray.evaluation import intervals, paired
from simla_ray.evaluation.paired import PerImage, paired_difference, read_per_image, t_quantile, write_per_image
from simla_ray.types import EvalResult

METRIC = "retrieval/itc/t2i_r10"


def run_of(numerators, denominators=None, uids=None):
    """A run whose metric is that of some images."""
    numerators = np.asarray(numerators, np.float32)
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, np.float32)
    sums = np.stack([numerators, denominators], axis=1)
    value = float(numerators.astype(np.float64).sum() / denominators.astype(np.float64).sum())
    return PerImage({METRIC: value}, tuple(uids or map(str, range(len(sums)))), {METRIC: sums})


def noisy(rng, n=40, seeds=3, shift=0.0):
    """Runs of captions' hits, one to five captions an image."""
    sizes = rng.integers(1, 6, n)
    return [run_of(rng.binomial(sizes, np.clip(0.4 + shift + rng.normal(0, 0.1), 0, 1)), sizes) for _ in range(seeds)]


def slow_differences(a, b):
    """One resample after the other, one pair of runs after the other."""
    rng, n = np.random.default_rng(0), len(a[0].uids)
    found = []
    for _ in range(intervals.RESAMPLES):
        drawn = rng.integers(0, n, n)
        row = []
        for first, second in zip(a, b, strict=True):
            parts = [sum(float(run.sums[METRIC][i, k]) for i in drawn) for run in (first, second) for k in (0, 1)]
            row.append(parts[0] / parts[1] - parts[2] / parts[3])
        found.append(row)
    return found


def test_numbers_of_three_seeds_against_a_loop():
    rng = np.random.default_rng(1)
    a, b = noisy(rng, shift=0.1), noisy(rng)
    found = paired_difference(a, b, METRIC)
    values = [[run.metrics[METRIC] for run in side] for side in (a, b)]
    each = [x - y for x, y in zip(*values, strict=True)]
    assert found["per_seed"] == pytest.approx(each) and found["mean"] == pytest.approx(sum(each) / 3)
    assert found["a"] - found["b"] == pytest.approx(found["mean"])
    for side, name in zip(values, ("std_a", "std_b"), strict=True):
        assert found[name] == pytest.approx(math.sqrt(sum((v - sum(side) / 3) ** 2 for v in side) / 2))
    assert (found["metric"], found["seeds"], found["images"]) == (METRIC, 3, 40)

    drawn = slow_differences(a, b)
    means = [sum(row[s] for row in drawn) / len(drawn) for s in range(3)]
    shared = []
    for s in range(3):
        for t in range(3):
            if s != t:
                products = [(row[s] - means[s]) * (row[t] - means[t]) for row in drawn]
                shared.append(sum(products) / (len(drawn) - 1))
    of_images = max(0.0, sum(shared) / 6)
    of_seeds = sum((d - found["mean"]) ** 2 for d in each) / 2 / 3
    reach = t_quantile(0.975, 2 * ((of_seeds + of_images) / of_seeds) ** 2) * math.sqrt(of_seeds + of_images)
    assert found["low"] == pytest.approx(found["mean"] - reach) and found["high"] == pytest.approx(
        found["mean"] + reach
    )


def test_one_seed_is_a_bootstrap_of_images_alone():
    rng = np.random.default_rng(2)
    a, b = noisy(rng, seeds=1, shift=0.2), noisy(rng, seeds=1)
    found = paired_difference(a, b, METRIC)
    drawn = [row[0] for row in slow_differences(a, b)]
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())
    assert found["std_a"] is found["std_b"] is None


def test_over_seeds_alone_by_hand():
    """Differences 1, 2 and 3 hundredths: 0.02 -+ 4.303 * 0.01 / sqrt(3). Two seeds 1 and 3: 0.02 -+ 12.706 * 0.01."""
    a = [PerImage({METRIC: value}) for value in (0.51, 0.52, 0.53)]
    b = [PerImage({METRIC: 0.5})] * 3
    found = paired_difference(a, b, METRIC)
    assert found["mean"] == pytest.approx(0.02) and found["std_a"] == pytest.approx(0.01) and found["std_b"] == 0
    assert [found["low"], found["high"]] == pytest.approx([0.02 - 0.024843, 0.02 + 0.024843], abs=1e-5)
    assert found["images"] is None
    two = paired_difference(a[::2], b[::2], METRIC)
    assert [two["low"], two["high"]] == pytest.approx([0.02 - 0.12706, 0.02 + 0.12706], abs=1e-4)
    one = paired_difference(a[:1], b[:1], METRIC)
    assert (one["low"], one["high"], one["std_a"], one["seeds"]) == (None, None, None, 1)


def test_other_images_cannot_be_paired():
    rng = np.random.default_rng(3)
    a, b = noisy(rng), noisy(rng)
    elsewhere = [PerImage(run.metrics, tuple(f"x{i}" for i in run.uids), run.sums) for run in b]
    without = [PerImage(run.metrics) for run in b]
    assert paired_difference(a, elsewhere, METRIC) == paired_difference(a, without, METRIC)
    assert paired_difference(a, elsewhere, METRIC)["images"] is None


def test_images_without_a_case_do_not_count():
    rng = np.random.default_rng(4)
    a, b = noisy(rng), noisy(rng)
    more = [[run_of(*np.concatenate([run.sums[METRIC], np.zeros((25, 2))]).T) for run in side] for side in (a, b)]
    assert paired_difference(*more, METRIC) == paired_difference(a, b, METRIC)


def test_nothing_differs():
    runs = noisy(np.random.default_rng(5))
    found = paired_difference(runs, runs, METRIC)
    assert (found["mean"], found["low"], found["high"]) == (0, 0, 0)


def test_what_cannot_be_paired_is_refused():
    runs = noisy(np.random.default_rng(6))
    with pytest.raises(ValueError, match="3 runs cannot be paired with 2"):
        paired_difference(runs, runs[:2], METRIC)
    with pytest.raises(ValueError, match="keywords/ap: not every run has it"):
        paired_difference(runs, runs, "keywords/ap")


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.95, 5, 2.0150), (0.975, 10, 2.2281),
     (0.975, 30, 2.0423), (0.975, 2000, 1.9612), (0.975, math.inf, 1.9600)],
)  # fmt: skip
def test_quantiles_of_t_are_those_of_the_tables(p, freedom, expected):
    assert t_quantile(p, freedom) == pytest.approx(expected, abs=2e-4)


def simulated(rng, seeds, of_seed, of_image, of_both, n=150):
    """Two configs that do not differ: a seed shifts a run, an image suits one of the configs, and luck with both."""
    shift, suits = rng.normal(0, of_seed, (2, seeds)), rng.normal(0, of_image, (2, n))
    return [
        [run_of(0.5 + shift[side, s] + suits[side] + rng.normal(0, of_both, n)) for s in range(seeds)]
        for side in (0, 1)
    ]


def coverage(monkeypatch, seeds, *noise, trials=200):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng, inside = np.random.default_rng(7), 0
    for _ in range(trials):
        found = paired_difference(*simulated(rng, seeds, *noise), METRIC)
        inside += found["low"] <= 0 <= found["high"]
    return inside / trials


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "noise", [(0.1, 0.1, 0.1), (0.0, 1.0, 0.1), (0.0, 0.1, 1.0), (0.03, 0.3, 0.3)],
    ids=["seeds", "images", "luck", "all"],
)  # fmt: skip
def test_the_interval_holds_the_truth_whatever_makes_the_noise(monkeypatch, seeds, noise):
    assert 0.90 <= coverage(monkeypatch, seeds, *noise) <= 0.99


def test_a_bootstrap_over_three_seeds_would_promise_too_much():
    rng, draws, inside = np.random.default_rng(8), np.random.default_rng(9).integers(0, 3, (300, 3)), 0
    for _ in range(500):
        means = rng.normal(0, 1, 3)[draws].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        inside += low <= 0 <= high
    assert inside / 500 < 0.82


def test_files_there_and_back(tmp_path):
    sums = np.arange(6, dtype=np.float32).reshape(3, 2)
    results = {
        "data": EvalResult("data", {"n_images": 3}, uids=("a", "b", "ü")),
        "retrieval": EvalResult("retrieval", {}, per_image={"itc/t2i_r10": sums}),
    }
    metrics = {"retrieval": {"itc": {"t2i_r10": 0.5}, "n_images": 3, "intervals": {"itc": {"t2i_r10": [0.4, 0.6]}}}}
    with pytest.raises(UserError, match=r"summary\.json: cannot be read"):
        read_per_image(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"eval": metrics | {"words": {"layers": [1], "x": "y"}}}))
    assert read_per_image(tmp_path) == PerImage({METRIC: 0.5, "retrieval/n_images": 3})
    write_per_image(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", paired.PER_IMAGE}
    found = read_per_image(tmp_path)
    assert found.uids == ("a", "b", "ü") and found.sums.keys() == {METRIC}
    assert (found.sums[METRIC] == sums).all() and found.metrics[METRIC] == 0.5


@pytest.mark.parametrize("damage", ["short", "shape", "names"])
def test_damaged_files_are_named(tmp_path, damage):
    (tmp_path / "summary.json").write_text('{"eval": {}}')
    path = tmp_path / paired.PER_IMAGE
    if damage == "short":
        path.write_bytes(b"\x10")
    else:
        save_file({METRIC: np.zeros((3, 2))}, path, {"uids": '["a"]'} if damage == "shape" else None)
    with pytest.raises(UserError, match=r"per_image\.safetensors: "):
        read_per_image(tmp_path)

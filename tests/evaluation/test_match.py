import numpy as np
import pytest

from simla_ray.evaluation import intervals, match
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.match import auc, auc_interval
from simla_ray.evaluation.work import Work

from .conftest import make_scorer


def slow_auc(right, wrong):
    return np.mean([(a > b) + (a == b) / 2 for a in right for b in wrong])


def test_auc_against_a_double_loop():
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        right, wrong = rng.integers(0, levels, 40).astype(float), rng.integers(0, levels, 25).astype(float)
        assert auc(right, wrong) == pytest.approx(slow_auc(right, wrong))


def test_auc_by_hand():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([0.0]), np.array([1.0])) == 0.0
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert auc(np.array([-np.inf]), np.array([-np.inf, -np.inf])) == 0.5


def test_auc_interval_against_a_loop(monkeypatch):
    """Images with one right score and none to three wrong ones, many of them equal."""
    monkeypatch.setattr(intervals, "RESAMPLES", 60)
    rng = np.random.default_rng(2)
    right, wrong = rng.integers(0, 6, 15).astype(float), rng.integers(0, 6, 24).astype(float)
    owner = rng.integers(0, 15, 24)
    draws, found = np.random.default_rng(0), []
    for _ in range(60):
        drawn = draws.integers(0, 15, 15)
        found.append(slow_auc(right[drawn], np.concatenate([wrong[owner == i] for i in drawn])))
    assert auc_interval(right, wrong, owner) == pytest.approx([np.percentile(found, 2.5), np.percentile(found, 97.5)])


def test_measure_against_a_loop(data):
    n = len(data)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(n, len(data.texts)))
    data.__dict__["image_vectors"] = rng.normal(size=(n, 6))
    data.__dict__["text_vectors"] = rng.normal(size=(len(data.texts), 6))
    data.match_logits = lambda image, text: logits[image, text]
    first = data.text_of_caption[data.first_caption]
    similar = data.image_vectors @ data.text_vectors[first].T
    true = data.satisfied[:, data.first_caption]
    right, random, hard = [], [], []
    for i, other in enumerate(data.derangement()):
        right.append(logits[i, first[i]])
        if not true[other, i]:
            random.append(logits[other, first[i]])
        image = max((j for j in range(n) if not true[j, i]), key=lambda j: similar[j, i])
        caption = max((j for j in range(n) if not true[i, j]), key=lambda j: similar[i, j])
        hard += [logits[image, first[i]], logits[i, first[caption]]]
    result = match.measure(data)
    assert result.metrics == {
        "n": n,
        "auc_random": pytest.approx(slow_auc(right, random)),
        "auc_hard": pytest.approx(slow_auc(right, hard)),
    }
    for name, (low, high) in result.intervals.items():
        assert low < result.metrics[name] < high
    assert {example["hit"] for example in result.examples} == {True, False}
    for example in result.examples:
        assert example["hit"] == (example["logit"] > example["wrong"]["logit"])
        assert "image" in example and "image" in example["wrong"]


def test_equal_captions_are_no_hard_negatives(scorer, world_rows):
    rows = [{k: v for k, v in row.items() if k not in ("claims", "scene")} for row in world_rows["test"][:3]]
    rows[1]["captions"] = rows[0]["captions"]
    data = EvalSet.load(scorer, rows, Work())
    text = data.text_of_caption[data.first_caption]
    image, caption, found = match._hardest(data, text)
    assert found.all() and image[:2].tolist() == [2, 2] and caption[:2].tolist() == [2, 2]


def test_nothing_wrong_to_compare_with(scorer, world_rows):
    rows = [{k: v for k, v in row.items() if k not in ("claims", "scene")} for row in world_rows["test"][:2]]
    rows[1]["captions"] = rows[0]["captions"]
    assert "wrong for certain" in match.measure(EvalSet.load(scorer, rows, Work()))
    assert match.measure(EvalSet.load(scorer, rows[:1], Work())) == "one image only"


def test_without_itc_only_random_pairs(vocabulary, world_rows):
    scorer = make_scorer(vocabulary, objectives__itc__weight=0, eval__best="last")
    result = match.measure(EvalSet.load(scorer, world_rows["test"][:6], Work()))
    assert set(result.metrics) == {"n", "auc_random"} and set(result.intervals) == {"auc_random"}

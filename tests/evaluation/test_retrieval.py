import itertools

import numpy as np
import pytest
import torch
import torchmetrics

from simla_ray.errors import UserError
from simla_ray.evaluation import intervals, retrieval
from simla_ray.evaluation.eval_set import EvalSet, load_items
from simla_ray.evaluation.retrieval import (
    chance,
    ranks,
    recall_intervals,
    recalls,
    reranked,
    validation_retrieval,
    vector_retrieval,
)
from simla_ray.evaluation.work import Work

from .conftest import make_scorer, on_ranks


def slow_rank(scores, right):
    """Position of the first right key, wrong ones first among equals."""
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], right[k]))
    return 1 + next(place for place, k in enumerate(order) if right[k])


def slow_rerank(scores, logits, right, k):
    """Position of the first right key after the first k, by score, are put in the order of their logits."""
    order = sorted(range(len(scores)), key=lambda j: -scores[j])
    head = sorted(order[:k], key=lambda j: -logits[j])
    return 1 + next(place for place, j in enumerate(head + order[k:]) if right[j])


def test_ranks_against_a_loop():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (200, 9)).astype(np.float32)  # many ties
    right = rng.random((200, 9)) < 0.3
    right[:, 4] |= ~right.any(1)
    assert ranks(scores, right).tolist() == [slow_rank(s, r) for s, r in zip(scores, right, strict=True)]


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    for value in (0.0, np.nan, -np.inf):
        assert ranks(np.full((2, 5), value), np.eye(5, dtype=bool)[:2]).tolist() == [5, 5]


def test_reranked_by_hand():
    first = np.array([1, 4, 9])
    logits = np.array([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    right = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=bool)
    assert reranked(first, logits, right).tolist() == [3, 3, 9]


def test_recalls_by_hand():
    found = recalls(np.array([1, 5, 11, 10]), np.array([1, 1]))
    assert found == {"i2t_r1": 0.25, "i2t_r5": 0.5, "i2t_r10": 0.75, "t2i_r1": 1.0, "t2i_r5": 1.0, "t2i_r10": 1.0}


def test_recall_intervals_against_a_loop(monkeypatch):
    """Images are drawn, with all their captions: one to five of them."""
    monkeypatch.setattr(intervals, "RESAMPLES", 80)
    rng = np.random.default_rng(3)
    owner = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    i2t, t2i = rng.integers(1, 15, 12), rng.integers(1, 15, len(owner))
    draws, resampled = np.random.default_rng(0), []
    for _ in range(80):
        drawn = draws.integers(0, 12, 12)
        resampled.append(recalls(i2t[drawn], np.concatenate([t2i[owner == i] for i in drawn])))
    found = recall_intervals(i2t, t2i, owner)
    assert set(found) == set(resampled[0])
    for name, ends in found.items():
        assert ends == pytest.approx(np.percentile([one[name] for one in resampled], [2.5, 97.5]))


def test_recalls_equal_torchmetrics_hit_rate():
    """Random scores, one to six captions an image; the hit rate of a query is whether a right key is in the first k."""
    rng = np.random.default_rng(4)
    owner = np.repeat(np.arange(25), rng.integers(1, 7, 25))
    scores = rng.normal(size=(25, len(owner))).astype(np.float32)
    right = owner[None, :] == np.arange(25)[:, None]
    found = recalls(ranks(scores, right), ranks(scores.T, right.T))
    for direction, s, r in (("i2t", scores, right), ("t2i", scores.T, right.T)):
        queries = np.broadcast_to(np.arange(len(s))[:, None], s.shape)
        given = [torch.from_numpy(np.ascontiguousarray(x).ravel()) for x in (s, r, queries)]
        for k in (1, 5, 10):
            rate = torchmetrics.retrieval.RetrievalHitRate(top_k=k)(given[0], given[1], indexes=given[2])
            assert found[f"{direction}_r{k}"] == pytest.approx(float(rate))


def test_recalls_equal_a_sorted_list_with_many_captions():
    rng = np.random.default_rng(5)
    owner = np.repeat(np.arange(30), rng.integers(1, 7, 30))
    scores = rng.normal(size=(30, len(owner)))
    right = owner[None, :] == np.arange(30)[:, None]
    found = recalls(ranks(scores, right), ranks(scores.T, right.T))
    for k in (1, 5, 10):
        first = [sorted(range(len(owner)), key=lambda c, row=row: -row[c])[:k] for row in scores]
        of_images = [any(owner[c] == i for c in best) for i, best in enumerate(first)]
        first = [sorted(range(30), key=lambda i, column=column: -column[i])[:k] for column in scores.T]
        of_captions = [owner[c] in best for c, best in enumerate(first)]
        assert found[f"i2t_r{k}"] == pytest.approx(np.mean(of_images))
        assert found[f"t2i_r{k}"] == pytest.approx(np.mean(of_captions))


def test_chance_against_all_orders():
    found = chance(np.array([1, 2, 1]), np.array([1, 1, 1, 1]))
    assert found["t2i_r1"] == pytest.approx(1 / 3) and found["t2i_r5"] == 1.0
    orders = list(itertools.permutations(range(4)))
    two = np.mean([order[0] in (1, 2) for order in orders])
    assert found["i2t_r1"] == pytest.approx((1 / 4 + two + 1 / 4) / 3)
    assert found["i2t_r5"] == 1.0


def with_random_scores(data, seed=0):
    """The set with random vectors and match logits in place of the model's; returns the logits (images, texts)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(data), len(data.texts)))
    for name, n in (("image_vectors", len(data)), ("text_vectors", len(data.texts))):
        data.__dict__[name] = rng.normal(size=(n, 6)).astype(np.float32)
    data.match_logits = lambda image, text: logits[image, text]
    return logits


def test_measure_against_a_loop(data):
    logits = with_random_scores(data)
    own = data.image_of_caption[None, :] == np.arange(len(data))[:, None]
    assert len(set(data.captions)) == len(data.captions), "equal captions would tie"
    similar, match = data.image_vectors @ data.text_vectors.T, logits
    k = data.run.eval.rerank_top_k
    result = retrieval.measure(data)
    metrics = result.metrics
    assert metrics["n_images"] == 40 and metrics["n_captions"] == 120
    for suffix, right in (("", own), ("_satisfied", data.satisfied)):
        both = [(similar, match, right), (similar.T, match.T, right.T)]
        itc = [np.array([slow_rank(s, r) for s, r in zip(a, c, strict=True)]) for a, _, c in both]
        itm = [np.array([slow_rerank(s, x, r, k) for s, x, r in zip(a, b, c, strict=True)]) for a, b, c in both]
        assert metrics["itc" + suffix] == recalls(*itc)
        assert metrics["itm" + suffix] == recalls(*itm)
        for ranker, both_ranks in (("itc", itc), ("itm", itm)):
            assert result.intervals[ranker + suffix] == recall_intervals(*both_ranks, data.image_of_caption)
    assert metrics["itc_satisfied"]["t2i_r10"] > metrics["itc"]["t2i_r10"]
    assert metrics["chance_satisfied"]["t2i_r1"] > metrics["chance"]["t2i_r1"] == pytest.approx(1 / 40)


def test_the_shortlist_has_the_length_of_the_key(vocabulary, world_rows):
    scorer = make_scorer(vocabulary, eval__rerank_top_k=3)
    data = EvalSet.load(scorer, world_rows["test"][:12], Work())
    logits = with_random_scores(data)
    similar = data.text_vectors @ data.image_vectors.T
    expected = [slow_rerank(similar[c], logits.T[c], np.arange(12) == c, 3) for c in range(12)]
    assert retrieval.measure(data).metrics["itm"]["t2i_r1"] == pytest.approx(np.mean(np.array(expected) == 1))
    assert retrieval.measure(data).metrics["itm"]["t2i_r5"] == pytest.approx(np.mean(np.array(expected) <= 5))


def test_examples_show_the_best_images_in_order(data):
    logits = with_random_scores(data)
    result = retrieval.measure(data)
    assert 0 < len(result.examples) <= 12
    uids = [item.uid for item in data.items]
    for example in result.examples:
        caption = data.captions.index(example["caption"])
        assert example["uid"] == uids[data.image_of_caption[caption]]
        assert example["hit"] == (example["rank"] == 1) == example["top"][0]["right"]
        scores = [entry["score"] for entry in example["top"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        for entry in example["top"]:
            image = uids.index(entry["uid"])
            assert entry["score"] == pytest.approx(logits[image, caption], abs=1e-4)
            assert entry["right"] == (image == data.image_of_caption[caption])
            assert entry["satisfied"] == data.satisfied[image, caption] and "image" in entry


def test_without_itc_every_pair_is_scored(vocabulary, world_rows, monkeypatch):
    monkeypatch.setattr(retrieval, "EXHAUSTIVE_IMAGES", 8)
    scorer = make_scorer(vocabulary, objectives__itc__weight=0, eval__best="last")
    data = EvalSet.load(scorer, world_rows["train"][:10], Work())
    metrics = retrieval.measure(data).metrics
    assert "itc" not in metrics and metrics["n_images"] == 8 and metrics["n_captions"] == 24
    few = data.first(8)
    image, text = (x.ravel() for x in np.indices((8, 24)))
    logits = few.match_logits(image, text).reshape(8, 24)
    own = few.image_of_caption[None, :] == np.arange(8)[:, None]
    assert metrics["itm"] == recalls(ranks(logits, own), ranks(logits.T, own.T))


def test_without_itm_nothing_is_reranked(vocabulary, world_rows):
    scorer = make_scorer(vocabulary, objectives__itm__weight=0)
    metrics = retrieval.measure(EvalSet.load(scorer, world_rows["test"][:5], Work())).metrics
    assert "itc" in metrics and "itm" not in metrics


def test_one_image_is_no_retrieval(scorer, world_rows):
    assert retrieval.measure(EvalSet.load(scorer, world_rows["test"][:1], Work())) == "one image only"


def test_vector_retrieval_by_hand():
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0, 1, 0], [0, 0.8, 0.6], [0, 0.6, 0.8]], dtype=np.float32)
    found = vector_retrieval(images, texts, np.array([0, 1, 2, 2]))
    # i2t: all three first. t2i: 0, 1 and 3 first, 2 second.
    assert found == {"retrieval_r1": pytest.approx((1 + 3 / 4) / 2), "retrieval_r10": 1.0}


def test_validation_is_the_itc_of_the_full_evaluation(scorer, world_rows):
    rows = [dict(row) for row in world_rows["train"][:30]]
    rows[4]["image"] = b"no image"
    rows[9]["image_id"] = rows[2]["image_id"]
    itc = retrieval.measure(EvalSet.load(scorer, rows, Work())).metrics["itc"]
    expected = {f"retrieval_r{k}": pytest.approx((itc[f"i2t_r{k}"] + itc[f"t2i_r{k}"]) / 2) for k in (1, 10)}
    for world in (1, 2, 3):
        shards = [load_items(scorer, rows[rank::world]) for rank in range(world)]
        found = on_ranks(world, lambda rank, gather, s=shards: validation_retrieval(scorer, s[rank], gather))
        assert found == [expected] * world


def test_validation_with_an_idle_rank_and_with_nothing(scorer, world_rows):
    rows = world_rows["test"][:2]
    found = on_ranks(3, lambda rank, gather: validation_retrieval(scorer, load_items(scorer, rows[rank::3]), gather))
    assert found[0] == found[2] == validation_retrieval(scorer, load_items(scorer, rows))
    with pytest.raises(UserError, match="no row can be evaluated"):
        validation_retrieval(scorer, [])

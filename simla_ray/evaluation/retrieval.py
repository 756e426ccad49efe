"""Zero-shot retrieval, image to text (i2t) and text to image (t2i), with any number of captions per image.

ITC's cosine ranks everything; ITM then re-ranks the first ``eval.rerank_top_k`` candidates of a query by its logit
alone, the others staying below in ITC's order (official ``Retrieval.py``, ``evaluation``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simla_ray.evaluation.eval_set import EvalSet, Item, split_dropped
from simla_ray.evaluation.examples import number, pick
from simla_ray.evaluation.intervals import image_sums, mean_intervals
from simla_ray.evaluation.scorer import Scorer, seen
from simla_ray.evaluation.work import Gather, chunks_of
from simla_ray.types import EvalResult

KS = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
QUERIES = 256
#: A run without ITC has no shortlist: ITM scores every pair, of at most this many images.
EXHAUSTIVE_IMAGES = 200
#: Images shown for a caption in the examples.
SHOWN = 5
#: What counts as right, as a suffix of the metric: the own image or caption; any that the built-in world knows to fit.
OWN, SATISFIED = "", "_satisfied"


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank of each query's best right key, from 1.

    A wrong key that ties with it counts as above it, so that equal scores everywhere give the worst rank, not the best;
    NaN scores below everything. The result is a lower bound of what any way to break ties would give.

    Args:
        scores: (q, n), higher is better.
        right: (q, n) bool, at least one True per row.
    """
    scores = np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((scores >= best) & ~right).sum(axis=1)


def reranked(first: np.ndarray, logits: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Ranks after the candidates of each query are put in the order of their logits.

    Where no right key is among the candidates its rank stays: all k candidates are wrong and above it, as before.

    Args:
        first: (q,) ranks by the scores that chose the candidates.
        logits, right: (q, k) of the candidates.
    """
    return np.where(right.any(axis=1), ranks(logits, right), first)


def recalls(i2t: np.ndarray, t2i: np.ndarray) -> dict[str, float]:
    """Ranks of both directions -> ``{"i2t_r1": ..., ..., "t2i_r10": ...}``, shares of the queries in 0..1."""
    both = {"i2t": i2t, "t2i": t2i}
    return {f"{name}_r{k}": float((both[name] <= k).mean()) for name in DIRECTIONS for k in KS}


def recall_intervals(i2t: np.ndarray, t2i: np.ndarray, image_of_caption: np.ndarray) -> dict[str, list[float]]:
    """``[low, high]`` of each of ``recalls``; what is drawn are images, with all their captions."""
    of_images = mean_intervals({f"i2t_r{k}": i2t <= k for k in KS})
    return of_images | mean_intervals({f"t2i_r{k}": t2i <= k for k in KS}, image_of_caption)


def recall_sums(i2t: np.ndarray, t2i: np.ndarray, image_of_caption: np.ndarray, images: int) -> dict[str, np.ndarray]:
    """``image_sums`` of each of ``recalls``."""
    of_images = image_sums({f"i2t_r{k}": i2t <= k for k in KS}, images)
    return of_images | image_sums({f"t2i_r{k}": t2i <= k for k in KS}, images, image_of_caption)


def vector_retrieval(
    image_vectors: np.ndarray, text_vectors: np.ndarray, image_of_caption: np.ndarray
) -> dict[str, float]:
    """Recall by cosine alone, mean of both directions: ``{"retrieval_r1": ..., "retrieval_r10": ...}``.

    Args:
        image_vectors: (n, E) unit rows.
        text_vectors: (m, E) unit rows, one per caption.
        image_of_caption: (m,) row of the caption's image; every image has a caption.
    """
    i2t, t2i = [], []
    for c in chunks_of(len(image_vectors), QUERIES):
        rows = np.asarray(c)
        i2t.append(ranks(image_vectors[rows] @ text_vectors.T, image_of_caption[None, :] == rows[:, None]))
    images = np.arange(len(image_vectors))
    for c in chunks_of(len(text_vectors), QUERIES):
        rows = np.asarray(c)
        t2i.append(ranks(text_vectors[rows] @ image_vectors.T, image_of_caption[rows][:, None] == images))
    found = recalls(np.concatenate(i2t), np.concatenate(t2i))
    return {f"retrieval_r{k}": (found[f"i2t_r{k}"] + found[f"t2i_r{k}"]) / 2 for k in (1, 10)}


def validation_retrieval(
    scorer: Scorer, loaded: Sequence[Item | str], gather: Gather = lambda own: [own]
) -> dict[str, float]:
    """``vector_retrieval`` over the rows of all ranks, each encoding its own. Collective.

    Args:
        loaded: this rank's rows as ``load_items`` gives them, decoded once for all validations.

    Raises:
        UserError: no row can be used.
    """
    scorer.eval_mode()
    numbered = [(i, item) for i, item in enumerate(loaded) if not isinstance(item, str)]
    own = [item for _, item in numbered]
    image_ids = [(i, item.image_id) for i, item in numbered]
    caption_ids = [item.image_id for item in own for _ in item.captions]
    vectors = None
    if own:
        images = scorer.encode_images(seen([item.sample for item in own]))[1]
        phrases = [said for item in own for said in item.said or ()] if scorer.reads_phrases else None
        texts = scorer.encode_texts([caption for item in own for caption in item.captions], phrases=phrases)[2]
        vectors = images.cpu().numpy(), texts.cpu().numpy()
    reasons = [item for item in loaded if isinstance(item, str)]
    shards = gather((image_ids, caption_ids, vectors, reasons))
    if not any(shard[0] for shard in shards):
        split_dropped(reason for shard in shards for reason in shard[3])
    image_vectors, text_vectors = (np.concatenate([s[2][k] for s in shards if s[2] is not None]) for k in (0, 1))
    # Rows of one image may lie on several ranks: the first of them, in the order of the rows, stands for it.
    rows = [(i * len(shards) + rank, image_id) for rank, shard in enumerate(shards) for i, image_id in shard[0]]
    place: dict[str, int] = {}
    for _, image_id, row in sorted((n, image_id, row) for row, (n, image_id) in enumerate(rows)):
        place.setdefault(image_id, row)
    number_of = {image_id: n for n, image_id in enumerate(place)}
    owner = np.array([number_of[i] for shard in shards for i in shard[1]])
    return vector_retrieval(image_vectors[list(place.values())], text_vectors, owner)


def measure(data: EvalSet) -> EvalResult | str:
    """Recall at 1, 5 and 10 of both directions.

    Metrics: ``n_images``, ``n_captions``; ``itc`` and ``itm`` (re-ranked), where the run has the objective;
    ``chance``, of a random order. In the built-in world also ``itc_satisfied``, ``itm_satisfied`` and
    ``chance_satisfied``, where every image that makes the caption true counts as right. Without ITC, ITM scores every
    pair of the first ``EXHAUSTIVE_IMAGES`` images. With neither, or with one image, the reason.
    """
    if not {"itc", "itm"} & data.active:
        return "no objective itc or itm"
    if len(data) < 2:
        return "one image only"
    images, per_image = len(data), {}
    if "itc" not in data.active:
        data = data.first(EXHAUSTIVE_IMAGES)
    metrics: dict[str, Any] = {"n_images": len(data), "n_captions": len(data.captions)}
    intervals = {}
    truths = [OWN] if data.satisfied is None else [OWN, SATISFIED]
    rankings = {direction: _ranking(data, direction, truths) for direction in DIRECTIONS}
    for ranker in ("itc", "itm"):
        if ranker in data.active:
            if ranker == "itm":
                _rerank(data, rankings, truths)
            for truth in truths:
                i2t, t2i = (rankings[d].ranks[truth] for d in DIRECTIONS)
                metrics[ranker + truth] = recalls(i2t, t2i)
                intervals[ranker + truth] = recall_intervals(i2t, t2i, data.image_of_caption)
                sums = recall_sums(i2t, t2i, data.image_of_caption, images)
                per_image |= {f"{ranker}{truth}/{name}": found for name, found in sums.items()}
    metrics["chance"] = chance(np.bincount(data.image_of_caption), np.ones(len(data.captions), np.int64))
    if data.satisfied is not None:
        metrics[f"chance{SATISFIED}"] = chance(data.satisfied.sum(1), data.satisfied.sum(0))
    return EvalResult("retrieval", metrics, _examples(data, rankings["t2i"]), intervals, per_image)


def chance(right_captions: np.ndarray, right_images: np.ndarray) -> dict[str, float]:
    """Recalls of a random order: right_captions (images,) of each image, right_images (captions,) of each caption."""
    found = {}
    for direction, right, total in (
        ("i2t", right_captions, len(right_images)),
        ("t2i", right_images, len(right_captions)),
    ):
        for k in KS:
            missed = [math.comb(total - int(r), k) / math.comb(total, min(k, total)) for r in right]
            found[f"{direction}_r{k}"] = 1 - sum(missed) / len(missed)
    return found


@dataclass
class Ranking:
    """One direction of retrieval.

    ``candidates`` (q, k): keys, best first; ``scores`` (q, k): theirs; ``ranks`` (q,): by what counts as right.
    """

    candidates: np.ndarray
    scores: np.ndarray
    ranks: dict[str, np.ndarray]


def _is_right(data: EvalSet, direction: str, query: np.ndarray, key: np.ndarray, truth: str) -> np.ndarray:
    """Whether keys answer queries; the two index arrays are broadcast."""
    image, caption = (query, key) if direction == "i2t" else (key, query)
    if truth == SATISFIED:
        assert data.satisfied is not None
        return data.satisfied[image, caption]
    return data.image_of_caption[caption] == image


def _ranking(data: EvalSet, direction: str, truths: Sequence[str]) -> Ranking:
    """ITC's ranks and shortlist; without ITC every key, unranked."""
    n_images, n_captions = len(data), len(data.captions)
    n_queries, n_keys = (n_images, n_captions) if direction == "i2t" else (n_captions, n_images)
    if "itc" not in data.active:
        every = np.tile(np.arange(n_keys), (n_queries, 1))
        return Ranking(every, np.zeros(every.shape, np.float32), {})
    captions = data.text_vectors[data.text_of_caption]
    queries, keys = (data.image_vectors, captions) if direction == "i2t" else (captions, data.image_vectors)
    k = min(n_keys, data.run.eval.rerank_top_k if "itm" in data.active else SHOWN)
    keys_on_device = torch.from_numpy(keys).to(data.scorer.device)

    def rank(chunk: range) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        rows = np.asarray(chunk)
        scores = torch.from_numpy(queries[rows]).to(keys_on_device) @ keys_on_device.T
        best, where = scores.nan_to_num(nan=-math.inf).topk(k)
        on_host, every = scores.cpu().numpy(), np.arange(n_keys)[None, :]
        found = {t: ranks(on_host, _is_right(data, direction, rows[:, None], every, t)) for t in truths}
        return where.cpu().numpy(), best.cpu().numpy(), found

    parts = data.work.map(rank, chunks_of(n_queries, QUERIES))
    found = {t: np.concatenate([part[2][t] for part in parts]) for t in truths}
    return Ranking(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), found)


def _rerank(data: EvalSet, rankings: dict[str, Ranking], truths: Sequence[str]) -> None:
    """Replace scores, order and ranks by those of ITM. Pairs that both directions ask for are scored once."""
    pairs = []
    for direction in DIRECTIONS:
        key = rankings[direction].candidates
        query = np.broadcast_to(np.arange(len(key))[:, None], key.shape)
        image, caption = (query, key) if direction == "i2t" else (key, query)
        pairs.append((image.ravel(), data.text_of_caption[caption].ravel()))
    logits = data.match_logits(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    start = 0
    for direction in DIRECTIONS:
        ranking = rankings[direction]
        key = ranking.candidates
        scores = logits[start : start + key.size].reshape(key.shape)
        start += key.size
        query = np.arange(len(key))[:, None]
        for truth in truths:
            right = _is_right(data, direction, query, key, truth)
            first = ranking.ranks.get(truth, np.zeros(len(key), np.int64))  # absent: every key is a candidate
            ranking.ranks[truth] = reranked(first, scores, right)
        order = np.argsort(-scores, axis=1, kind="stable")
        ranking.candidates = np.take_along_axis(key, order, 1)
        ranking.scores = np.take_along_axis(scores, order, 1)


def _examples(data: EvalSet, ranking: Ranking) -> list[dict[str, Any]]:
    """Captions with the images found for them; half of them found first."""
    examples = []
    for caption in pick(ranking.ranks[OWN] == 1):
        own = int(data.image_of_caption[caption])
        top = []
        for image, score in zip(ranking.candidates[caption][:SHOWN], ranking.scores[caption][:SHOWN], strict=True):
            entry = {"uid": data.items[image].uid, "score": number(score), "right": bool(image == own)}
            if data.satisfied is not None:
                entry["satisfied"] = bool(data.satisfied[image, caption])
            top.append(entry | data.picture(image))
        rank = int(ranking.ranks[OWN][caption])
        query = {"uid": data.items[own].uid, "caption": data.captions[caption], "rank": rank, "hit": rank == 1}
        examples.append(query | {"top": top} | data.picture(own))
    return examples

"""Masked words and patches: does the model read the picture, or only guess from the sentence?

A masked colour word is predicted over the right picture and over another one: only the picture can tell the colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simla_ray.data.collate import collate
from simla_ray.data.sample import stacked
from simla_ray.data.text import Vocabulary
from simla_ray.evaluation.eval_set import IMAGES, EvalSet
from simla_ray.evaluation.examples import pick, spread
from simla_ray.evaluation.intervals import image_sums, mean_intervals, ratio_intervals
from simla_ray.evaluation.work import chunks_of
from simla_ray.models.family import forward
from simla_ray.models.needs import Needs
from simla_ray.models.precision import autocast
from simla_ray.types import EvalResult

COLORS = (
    "beige", "black", "blue", "brown", "cyan", "gold", "gray", "green", "grey", "magenta", "maroon", "navy", "orange",
    "pink", "purple", "red", "silver", "tan", "teal", "turquoise", "violet", "white", "yellow",
)  # fmt: skip
MAX_WORDS = 1000
MASKED = 64


@dataclass(frozen=True)
class Masked:
    """One masked word: position and id of its piece in the first caption of an item."""

    item: int
    position: int
    token_id: int
    word: str


def color_words(data: EvalSet) -> list[Masked]:
    """Every colour word of the first captions that is a single piece, masked alone; ``MAX_WORDS`` spread evenly."""
    vocabulary, limit = data.scorer.vocabulary, data.run.text.max_tokens
    pieces = {word: vocabulary.word_ids(word) for word in COLORS}
    whole = {word: ids[0] for word, ids in pieces.items() if len(ids) == 1 and ids[0] != vocabulary.unk_id}
    found = []
    for i, item in enumerate(data.items):
        for position, word in enumerate(vocabulary.encode(item.captions[0], limit).words):
            if word in whole:
                found.append(Masked(i, position, whole[word], word))
    return [found[k] for k in spread(len(found), MAX_WORDS)]


def measure(data: EvalSet, tokenizer: nn.Module | None = None) -> EvalResult | str:
    """Accuracy of the most likely word of the whole vocabulary, and of the most likely visual code.

    Metrics: ``color_right``, ``color_wrong``, ``n``: masked colour words predicted over the right and over another
    picture; ``mlm_accuracy``: words masked as in validation; ``mim_accuracy``: patches, where ``tokenizer`` (pictures
    -> codes) is given, of the first ``mim.batch_fraction`` of each batch as in training. Where the run predicts
    neither, the reason.
    """
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    per_image: dict[str, np.ndarray] = {}
    examples: list[dict[str, Any]] = []
    cases = color_words(data) if "mlm" in data.active and len(data) > 1 else []
    if cases:
        wrong_image = data.derangement()
        chunks = chunks_of(len(cases), MASKED)
        parts = data.work.map(lambda c: _predict(data, [cases[i] for i in c], wrong_image), chunks)
        right, wrong = np.concatenate(parts, axis=1)
        truth = np.array([case.token_id for case in cases])
        hits = {"color_right": right == truth, "color_wrong": wrong == truth}
        metrics |= {name: float(hit.mean()) for name, hit in hits.items()}
        metrics["n"] = len(cases)
        owner = np.array([case.item for case in cases])
        intervals |= mean_intervals(hits, owner)
        per_image |= image_sums(hits, len(data), owner)
        examples = _examples(data, cases, right, wrong)
    for name, (right, total, owner) in _counts(data, tokenizer).items():
        metrics[name] = float(right.sum() / total.sum())
        (intervals[name],) = ratio_intervals(right[:, None], total)
        per_image |= image_sums({name: right}, len(data), owner, total)
    return EvalResult("words", metrics, examples, intervals, per_image) if metrics else "no objective mlm or mim"


@torch.no_grad()
def _predict(data: EvalSet, cases: list[Masked], wrong_image: np.ndarray) -> np.ndarray:
    """(2, n) predicted ids: over the right and over the wrong pictures."""
    scorer = data.scorer
    items = [data.items[case.item] for case in cases]
    phrases = [item.said[0] if item.said else () for item in items]
    ids, mask = scorer.tokenize([item.captions[0] for item in items], [case.position for case in cases], phrases)
    position = torch.tensor([case.position for case in cases], device=ids.device)
    rows = torch.arange(len(cases), device=ids.device)
    ids[rows, position] = scorer.vocabulary.mask_id
    own = np.array([case.item for case in cases])
    images, index = np.unique(np.stack([own, wrong_image[own]]), return_inverse=True)
    tokens = scorer.image_tokens(data.images(images))
    predicted = []
    for which in torch.from_numpy(index.reshape(2, -1)).to(ids.device):
        hidden = scorer.fuse(tokens, which, ids, mask)[rows, position]
        with autocast(scorer.run, scorer.device):
            predicted.append(scorer.model.student.text.word_logits(hidden).argmax(-1))
    return torch.stack(predicted).cpu().numpy()


def _counts(data: EvalSet, tokenizer: nn.Module | None) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Accuracies as (n,) right and (n,) all positions of n images, and which (n,) these are."""
    active = data.active & ({"mlm"} if tokenizer is None else {"mlm", "mim"})
    if not active:
        return {}
    chunks = chunks_of(len(data), IMAGES)
    parts = data.work.map(lambda c: _count(data, active, tokenizer, c), chunks)
    found = {}
    for name in sorted(active, reverse=True):
        right, total = np.concatenate([part[name] for part in parts], axis=1)
        owner = np.concatenate([c[: part[name].shape[1]] for c, part in zip(chunks, parts, strict=True)])
        if total.any():
            found[f"{name}_accuracy"] = right, total, owner
    return found


@torch.no_grad()
def _count(data: EvalSet, active: set[str], tokenizer: nn.Module | None, chunk: range) -> dict[str, np.ndarray]:
    """(2, n) right and all positions of each image, per objective, by training's own forward without its teacher."""
    scorer, objectives = data.scorer, data.run.objectives
    batch = collate(stacked([data.items[i].sample for i in chunk]), data.run).to(scorer.device)
    with autocast(scorer.run, scorer.device):
        record = forward(scorer.model, batch, objectives, Needs.of(objectives, active, has_teacher=False))
    counts = {}
    if "mlm" in active:
        counts["mlm"] = _right(record.mlm_logits, batch.mlm_label, batch.mlm_weight)
    if "mim" in active:
        assert tokenizer is not None
        codes = tokenizer(batch.code_image if batch.code_image is not None else batch.image[: len(batch.patch_mask)])
        counts["mim"] = _right(record.mim_logits, codes.gather(1, batch.mim_index), batch.mim_weight)
    return counts


def _right(logits: Tensor | None, label: Tensor, weight: Tensor) -> np.ndarray:
    assert logits is not None
    return torch.stack([((logits.argmax(-1) == label) * weight).sum(1), weight.sum(1)]).double().cpu().numpy()


def _examples(data: EvalSet, cases: list[Masked], right: np.ndarray, wrong: np.ndarray) -> list[dict[str, Any]]:
    vocabulary: Vocabulary = data.scorer.vocabulary
    examples = []
    for k in pick(right == np.array([case.token_id for case in cases])):
        case = cases[k]
        item = data.items[case.item]
        example = {
            "uid": item.uid,
            "caption": _with_mask(vocabulary, item.captions[0], case, data.run.text.max_tokens),
            "word": case.word,
            "right": vocabulary.token(right[k]),
            "wrong": vocabulary.token(wrong[k]),
            "hit": bool(right[k] == case.token_id),
        }
        examples.append(example | data.picture(case.item))
    return examples


def _with_mask(vocabulary: Vocabulary, caption: str, case: Masked, max_tokens: int) -> str:
    """The caption with the word in its place shown as [MASK]."""
    encoded = vocabulary.encode(caption, max_tokens)
    # The same word may come twice: count which one is masked. A word starts where its own pieces start.
    earlier = sum(
        word == case.word and start == i
        for i, (word, start) in enumerate(zip(encoded.words[: case.position], encoded.word_start, strict=False))
    )
    words = caption.split()
    place = [i for i, word in enumerate(words) if word == case.word][earlier]
    return " ".join([*words[:place], "[MASK]", *words[place + 1 :]])

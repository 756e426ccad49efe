"""Labels of statements about one image or two: visual entailment, NLVR, NLVR2, by a run fine-tuned for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simla_ray.evaluation.answers import normal
from simla_ray.evaluation.blind import Blind
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.examples import number, pick
from simla_ray.evaluation.intervals import image_sums, mean_interval
from simla_ray.evaluation.work import chunks_of
from simla_ray.models.precision import autocast
from simla_ray.models.question import question_cls
from simla_ray.types import EvalResult

STATEMENTS = 32


@dataclass(frozen=True)
class Statement:
    item: int
    text: str
    label: int


def statements_of(data: EvalSet) -> tuple[list[Statement], int]:
    """Every statement with a label of the run's, in order; and how many have another one."""
    labels = data.run.objectives.labels
    assert labels is not None
    number_of = {name: i for i, name in enumerate(labels.classes)}
    every = [(i, s) for i, item in enumerate(data.items) for s in item.statements]
    kept = [Statement(i, s["text"], number_of[s["label"]]) for i, s in every if s["label"] in number_of]
    return kept, len(every) - len(kept)


def measure(data: EvalSet, blind: Blind | None = None) -> EvalResult | str:
    """Share of statements that get their label.

    Metrics: ``accuracy``; ``n`` statements; ``chance``, one label of all; ``majority`` and ``text_only``: what is
    reached without looking, by the most frequent label of training, and by a judge of the statement's words;
    ``classes``: label -> n and the share that is found; ``unknown``: statements with a label that the run does not
    know, left out. The reason why there is none otherwise.
    """
    if "labels" not in data.active:
        return "no objective labels"
    statements, unknown = statements_of(data)
    if not statements:
        return f"{unknown:,} statements, none with a label of the run" if unknown else "no column statements"
    labels = data.run.objectives.labels
    assert labels is not None
    chunks = chunks_of(len(statements), STATEMENTS)
    logits = np.concatenate(data.work.map(lambda c: _judged(data, [statements[i] for i in c]), chunks))
    truth, images = (np.array([getattr(s, name) for s in statements]) for name in ("label", "item"))
    found = np.nan_to_num(logits, nan=-np.inf).argmax(1)
    right = found == truth
    metrics: dict[str, Any] = {
        "accuracy": float(right.mean()), "n": len(statements), "chance": 1 / len(labels.classes),
    }  # fmt: skip
    intervals = {"accuracy": mean_interval(right, images)}
    per_image = image_sums({"accuracy": right}, len(data), images)
    if blind is not None:
        names = [labels.classes[i] for i in truth]
        said = blind.said([s.text for s in statements])
        for name in ("majority", "text_only"):
            hits = np.array([normal(one) == normal(true) for one, true in zip(said[name], names, strict=True)])
            metrics[name], intervals[name] = float(hits.mean()), mean_interval(hits, images)
            per_image |= image_sums({name: hits}, len(data), images)
    metrics["classes"] = {
        name: {"n": int((truth == i).sum()), "recall": float(right[truth == i].mean())}
        for i, name in enumerate(labels.classes)
        if (truth == i).any()
    }
    if unknown:
        metrics["unknown"] = unknown
    return EvalResult("statements", metrics, _examples(data, statements, logits, right), intervals, per_image)


@torch.no_grad()
def _judged(data: EvalSet, statements: list[Statement]) -> np.ndarray:
    """(n, classes) float32"""
    scorer, model = data.scorer, data.scorer.model
    labels = data.run.objectives.labels
    assert labels is not None and model.label_head is not None
    images, index = np.unique([statement.item for statement in statements], return_inverse=True)
    which = ["image", "second_image"][: labels.pictures]
    row = torch.from_numpy(index).to(scorer.device)
    tokens = torch.cat([scorer.image_tokens(data.images(images, name))[row] for name in which])
    with autocast(scorer.run, scorer.device):
        cls = question_cls(model, tokens, *scorer.tokenize([statement.text for statement in statements]))
        logits = model.label_head(cls.unflatten(0, (len(which), -1)).transpose(0, 1).flatten(1))
    return logits.float().cpu().numpy()


def _examples(
    data: EvalSet, statements: list[Statement], logits: np.ndarray, right: np.ndarray
) -> list[dict[str, Any]]:
    labels = data.run.objectives.labels
    assert labels is not None
    examples = []
    for k in pick(right):
        statement, shown = statements[k], np.exp(logits[k] - logits[k].max())
        example = {
            "uid": data.items[statement.item].uid,
            "statement": statement.text,
            "label": labels.classes[statement.label],
            "found": labels.classes[int(logits[k].argmax())],
            "probability": number(float(shown.max() / shown.sum())),
            "hit": bool(right[k]),
        }
        for name in ["image", "second_image"][: labels.pictures]:
            example |= data.picture(statement.item, name)
        examples.append(example)
    return examples

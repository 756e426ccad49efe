"""Answers to questions about an image, by a run that was fine-tuned for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simla_ray.data.questions import known
from simla_ray.evaluation.answers import vqa_accuracy
from simla_ray.evaluation.blind import Blind
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.examples import pick
from simla_ray.evaluation.intervals import image_sums, mean_interval
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.work import chunks_of
from simla_ray.models.precision import autocast
from simla_ray.models.question import answer_likelihoods, question_cls
from simla_ray.types import EvalResult

QUESTIONS = 32


@dataclass(frozen=True)
class Question:
    item: int
    text: str
    answers: list[str]
    kind: str


def questions_of(data: EvalSet) -> list[Question]:
    """Every question of every image, in order."""
    return [
        Question(i, qa["question"], list(qa["answers"]), qa.get("type") or "")
        for i, item in enumerate(data.items)
        for qa in item.qas
    ]


def measure(data: EvalSet, blind: Blind | None = None) -> EvalResult | str:
    """Accuracy of the likeliest known answer, by the official VQA formula (``answers.vqa_accuracy``).

    Metrics: ``accuracy``; ``n`` questions; ``known``: what the best of the known answers to each question would reach;
    ``majority``, ``majority_of_type`` and ``text_only``: what is reached without looking, by the best constant answer
    of training, that of questions with the same two first words, and a judge of the question's words; ``types``: the
    same for each type of question. The reason why there is none otherwise.
    """
    if "answers" not in data.active:
        return "no objective answers"
    questions = questions_of(data)
    if not questions:
        return "no column qas"
    parts = data.work.map(lambda c: _answered(data, [questions[i] for i in c]), chunks_of(len(questions), QUESTIONS))
    numbers = np.concatenate(parts)
    names = data.scorer.vocabulary.answers
    found = [names[i] for i in numbers]
    right = _accuracies(found, questions)
    images = np.array([question.item for question in questions])
    among = set(names)
    metrics: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "n": len(questions),
        "known": float(np.mean([_reachable(q, among) for q in questions])),
    }
    baselines = {}
    if blind is not None:
        baselines = {
            name: _accuracies(said, questions) for name, said in blind.said([q.text for q in questions]).items()
        }
        metrics |= {name: float(values.mean()) for name, values in baselines.items()}
    kinds = np.array([question.kind for question in questions])
    if len(set(kinds)) > 1:
        metrics["types"] = {
            str(kind): {"n": int((kinds == kind).sum()), "accuracy": float(right[kinds == kind].mean())}
            | {name: float(values[kinds == kind].mean()) for name, values in baselines.items()}
            for kind in sorted(set(kinds))
        }
    intervals = {"accuracy": mean_interval(right, images)}
    intervals |= {name: mean_interval(values, images) for name, values in baselines.items()}
    per_image = image_sums({"accuracy": right} | baselines, len(data), images)
    return EvalResult("vqa", metrics, _examples(data, questions, found, right), intervals, per_image)


def answer(scorer: Scorer, tokens: torch.Tensor, index: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """Scores of the known answers to questions, (n, K) float32: log-likelihoods, or of a classifier logits.

    Args:
        tokens: (m, N, D) of images; index: (n,) the row of each question's.
    """
    answers = scorer.run.objectives.answers
    assert answers is not None
    model, ids_mask = scorer.model, scorer.tokenize(texts)
    names = scorer.vocabulary.answers
    with torch.no_grad(), autocast(scorer.run, scorer.device):
        if model.answer_head is not None:
            return model.answer_head(question_cls(model, tokens[index], *ids_mask)).float()[:, : len(names)]
        assert model.decoder is not None
        states = scorer.fuse(tokens, index, *ids_mask)
        table, pad_id = scorer.answer_table, scorer.vocabulary.pad_id
        return answer_likelihoods(model.decoder, states, ids_mask[1], table, pad_id, scorer.run.eval.answers_top_k)


def _answered(data: EvalSet, questions: list[Question]) -> np.ndarray:
    """(n,) numbers of the likeliest known answers."""
    images, index = np.unique([question.item for question in questions], return_inverse=True)
    tokens = data.scorer.image_tokens(data.images(images))
    scores = answer(data.scorer, tokens, torch.from_numpy(index).to(tokens.device), [q.text for q in questions])
    return scores.nan_to_num(nan=-torch.inf).argmax(1).cpu().numpy()


def _reachable(question: Question, among: set[str]) -> float:
    """The accuracy of the annotators' best answer that is one of the known."""
    said = {known(answer) for answer in question.answers} & among
    return max((vqa_accuracy(answer, question.answers) for answer in said), default=0.0)


def _accuracies(said: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    return np.array([vqa_accuracy(one, q.answers) for one, q in zip(said, questions, strict=True)])


def _examples(data: EvalSet, questions: list[Question], found: list[str], right: np.ndarray) -> list[dict[str, Any]]:
    examples = []
    for k in pick(right >= 0.5):
        question = questions[k]
        example = {
            "uid": data.items[question.item].uid,
            "question": question.text,
            "type": question.kind,
            "answers": sorted({known(a) for a in question.answers}),
            "found": found[k],
            "hit": bool(right[k] >= 0.5),
        }
        examples.append(example | data.picture(question.item))
    return examples

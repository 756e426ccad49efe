"""What a row asks, for fine-tuning: one of its questions with an answer, or one of its statements with a label.

An epoch passes every row once, with one question drawn from (seed, epoch, uid), as it passes a picture with one of its
captions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simla_ray.config.schema import AnswerHead, Run
from simla_ray.data.decode import DropRow
from simla_ray.data.text import Encoded, Vocabulary, clean

#: The label that torch's cross-entropy passes over. Not imported: what makes samples does without torch.
NO_LABEL = -100
#: Objective -> the column that it reads.
COLUMNS = {"answers": "qas", "labels": "statements"}


@dataclass(frozen=True)
class Asked:
    """A question or statement, cleaned and encoded; ``said`` is it with its answer, ``target`` the arrays to learn."""

    encoded: Encoded
    said: str
    target: dict[str, np.ndarray]


def task_columns(run: Run) -> tuple[str, ...]:
    """Columns that a run reads beside those of pretraining."""
    on = run.objectives.active()
    found = [column for name, column in COLUMNS.items() if name in on]
    if run.objectives.labels is not None and "labels" in on and run.objectives.labels.pictures == 2:
        found.append("images")
    return tuple(found)


def asked_column(columns: Iterable[str]) -> str | None:
    """The one of ``task_columns`` that holds what is asked; None in pretraining."""
    return next((column for column in columns if column in COLUMNS.values()), None)


def known(answer: str) -> str:
    """An answer as it stands in the list of answers."""
    return " ".join(answer.lower().split())


def frequent_answers(qas: Iterable[Mapping[str, Any]], most: int) -> list[str]:
    """The ``most`` most frequent answers; each question counts once, by what most annotators say."""
    counts = Counter(agreed(qa["answers"]) for qa in qas if qa["answers"])
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]


def agreed(answers: Iterable[str]) -> str:
    """What most annotators say; of several the first in the alphabet."""
    counts = Counter(known(answer) for answer in answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


class Asker:
    """Draws what a sample asks.

    Args:
        training: False takes the first question, and the answer that most annotators give; a classifier that does not
            know it has no label there, and training passes such a question over.
    """

    def __init__(self, run: Run, vocabulary: Vocabulary, *, training: bool):
        self.run, self.vocabulary, self.training = run, vocabulary, training
        on = run.objectives.active()
        self.answers = run.objectives.answers if "answers" in on else None
        self.labels = run.objectives.labels if "labels" in on else None
        self.number = {answer: i for i, answer in enumerate(vocabulary.answers)} if self.answers is not None else {}

    @property
    def asks(self) -> bool:
        return self.answers is not None or self.labels is not None

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> Asked:
        """Ask one of the questions, or state one of the statements, that can be used.

        Raises:
            DropRow: qas_empty, statements_empty, label_unknown.
        """
        if self.answers is not None:
            return self._drawn(row.get("qas"), self._question, rng, "qas_empty")
        statements = row.get("statements") or ()
        assert self.labels is not None
        usable = [s for s in statements if s["label"] in self.labels.classes]
        if statements and not usable:
            raise DropRow("label_unknown")
        return self._drawn(usable, self._statement, rng, "statements_empty")

    def _drawn(self, entries: Any, ask: Any, rng: np.random.Generator, reason: str) -> Asked:
        entries = entries or ()
        for i in rng.permutation(len(entries)) if self.training else range(len(entries)):
            if (asked := ask(entries[i], rng)) is not None:
                return asked
        raise DropRow(reason)

    def _statement(self, statement: Mapping[str, Any], rng: np.random.Generator) -> Asked | None:
        assert self.labels is not None
        text, encoded = self._encoded(statement["text"])
        label = np.int64(self.labels.classes.index(statement["label"]))
        return Asked(encoded, text, {"label": label}) if len(encoded.ids) > 1 else None

    def _question(self, qa: Mapping[str, Any], rng: np.random.Generator) -> Asked | None:
        assert self.answers is not None
        text, encoded = self._encoded(qa["question"])
        answers = [known(answer) for answer in qa["answers"]]
        if self.training and self.answers.head is AnswerHead.classifier:
            answers = [answer for answer in answers if answer in self.number]
        if len(encoded.ids) == 1 or not answers:
            return None
        answer = answers[int(rng.integers(len(answers)))] if self.training else agreed(answers)
        if self.answers.head is AnswerHead.classifier:
            return Asked(encoded, f"{text} {answer}", {"label": np.int64(self.number.get(answer, NO_LABEL))})
        ids = answer_ids(self.vocabulary, answer, self.answers.max_tokens)
        return Asked(encoded, f"{text} {answer}", {"answer_ids": ids})

    def _encoded(self, text: str) -> tuple[str, Encoded]:
        limits = self.run.text
        cleaned = clean(text, limits.max_words)
        return cleaned, self.vocabulary.encode(cleaned, limits.max_tokens)


def answer_ids(vocabulary: Vocabulary, answer: str, max_tokens: int) -> np.ndarray:
    """(max_tokens + 1,) [CLS], the answer's pieces, [SEP], padding; a long answer is cut before its end.

    An answer without a letter or digit is [UNK].
    """
    pieces = vocabulary.encode(clean(answer, max_tokens), max_tokens).ids[1:].tolist() or [vocabulary.unk_id]
    ids = [vocabulary.cls_id, *pieces[: max_tokens - 1], vocabulary.sep_id]
    return np.array(ids + [vocabulary.pad_id] * (max_tokens + 1 - len(ids)))

"""What can be said about a question or a statement without looking at its image: the baselines of fine-tuned tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from simla_ray.data.questions import agreed
from simla_ray.evaluation.answers import Majority, majority_answer, question_type
from simla_ray.evaluation.text_only import WEIGHTS, WORDS, TextOnly, fit_text_only

FILE = "majority.json"
#: All that ``Blind.save`` writes.
FILES = (FILE, WEIGHTS, WORDS)


@dataclass(frozen=True)
class Blind:
    """The best constant answer, over all and for each beginning of a question, and a judge of the words alone."""

    majority: Majority
    text_only: TextOnly

    @classmethod
    def fit(cls, texts: Sequence[str], answers: Sequence[Sequence[str]], seed: int) -> Blind:
        """From training texts with their answers or labels. The type of a question is how it begins: a type that
        annotators gave may tell its answer.

        Raises:
            ValueError: there are none.
        """
        labels = [said[0] if len(said) == 1 else agreed(said) for said in answers]
        return cls(majority_answer(list(map(question_type, texts)), answers), fit_text_only(texts, labels, seed))

    def said(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """``majority``, ``majority_of_type`` and ``text_only`` -> an answer or label for each text."""
        return {
            "majority": [self.majority.overall] * len(texts),
            "majority_of_type": self.majority.predict(list(map(question_type, texts))),
            "text_only": self.text_only.predict(texts),
        }

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self.majority)))
        self.text_only.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Blind | None:
        """None where the folder holds none."""
        if not (folder / FILE).exists():
            return None
        return cls(Majority(**json.loads((folder / FILE).read_text())), TextOnly.load(folder))

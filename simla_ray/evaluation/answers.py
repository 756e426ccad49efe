"""Accuracy of answers to questions as in VQA (Antol et al., 2015; visualqa.org/evaluation), and what guessing reaches.

An answer is worth min(1, n / 3) where n annotators gave it, averaged over the subsets that leave one annotator out.
Answers are compared in a normal form: lower case, without articles and most punctuation, small numbers as digits,
contractions with their apostrophes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
#: What the rules call punctuation; apostrophes and colons stay (girl's, 2:50 pm), full stops have a rule of their own.
MARKS = ';/[]"{}()=+\\_-><@`,?!'
#: Endings of contractions, and the words that they are put right after: where nothing else is written like that without
#: apostrophes ("its", "were" and the like are left alone).
ENDINGS = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could i might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he i it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
}
OTHERS = ("i'm", "ma'am", "o'clock", "y'all", "'twas", "'ow's'at")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_WORD = re.compile(r"[\w']+")
_FULL_STOP = re.compile(r"\.(?!\d)")


def _spellings(contraction: str) -> Iterable[str]:
    """The contraction with one or more of its apostrophes missing."""
    places = [i for i, letter in enumerate(contraction) if letter == "'"]
    for n in range(1, len(places) + 1):
        for left_out in combinations(places, n):
            yield "".join(letter for i, letter in enumerate(contraction) if i not in left_out)


_CONTRACTIONS = [word + ending for ending, words in ENDINGS.items() for word in words.split()] + list(OTHERS)
_APOSTROPHES = {spelling: right for right in _CONTRACTIONS for spelling in _spellings(right)}


@lru_cache(maxsize=2**18)
def normal(answer: str) -> str:
    """The form in which answers are compared; empty where nothing but articles and punctuation is left.

    A mark becomes a space; where it touches one, or where a comma is inside a number, marks vanish (100,978 -> 100978).
    A full stop stays before a digit only. We differ from the official code (``vqaEval.py``) where that falls short of
    the published rules: it leaves answers as they are on which all annotators agree, and some contractions undone.
    """
    text = " ".join(answer.split())
    joined = _COMMA_IN_NUMBER.search(text) is not None
    kept = text
    for mark in MARKS:
        if mark in text:
            touches = joined or f"{mark} " in text or f" {mark}" in text
            kept = kept.replace(mark, "" if touches else " ")
    words = (NUMBERS.get(word, word) for word in _FULL_STOP.sub("", kept).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in 0..1 of a prediction against what the annotators said.

    With fewer than the usual ten annotators the formula is the same; with one the answers must be equal.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("a question without answers")
    given = normal(prediction)
    n, same = len(answers), sum(normal(answer) == given for answer in answers)
    if n == 1:
        return float(same)
    # Of the n subsets, those without one of the equal answers have one match less.
    return (same * min(1.0, (same - 1) / 3) + (n - same) * min(1.0, same / 3)) / n


def question_type(question: str) -> str:
    """The first two words of a question, its kind for ``Majority``: "how many", "is the", "what color"."""
    return " ".join(_WORD.findall(question.lower())[:2])


@dataclass(frozen=True)
class Majority:
    """The best constant answer: of all questions, and of each type of question."""

    overall: str
    by_type: dict[str, str]

    def predict(self, types: Sequence[str]) -> list[str]:
        """The answer of each question's type; of an unknown one, that of all questions."""
        return [self.by_type.get(kind, self.overall) for kind in types]


def majority_answer(types: Sequence[str], answers: Sequence[Sequence[str]]) -> Majority:
    """The constant answers with the highest accuracy on these questions, ties in alphabetical order.

    With one answer a question that is the most frequent one. Choose on training questions, report on others.

    Args:
        types: (n,) type of each question.
        answers: (n,) what its annotators said.

    Raises:
        ValueError: there are no questions, or one without answers.
    """
    if not types:
        raise ValueError("no questions")
    worth: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    overall: dict[str, float] = defaultdict(float)
    for kind, said in zip(types, answers, strict=True):
        if not said:
            raise ValueError("a question without answers")
        for answer in sorted(set(map(normal, said))):
            accuracy = vqa_accuracy(answer, said)
            worth[kind][answer] += accuracy
            overall[answer] += accuracy
    return Majority(_best(overall), {kind: _best(counted) for kind, counted in worth.items()})


def _best(worth: dict[str, float]) -> str:
    # Sums of thirds in another order differ in their last bits.
    return min(worth, key=lambda answer: (-round(worth[answer], 6), answer))

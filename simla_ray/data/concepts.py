"""The vocabulary of phrase concepts: which tuples of words have an id, and which of a caption's become tokens.

Source: MVPTR (``id2phrase_new.json`` and README, "Data Preprocess"): ids of single words are those of their word
pieces, others follow the last piece; kept is what enough captions say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simla_ray.config.schema import Concepts as ConceptsConfig
from simla_ray.data.phrases import Phrase
from simla_ray.errors import UserError

#: File of the concepts, beside those of the vocabulary.
CONCEPTS = "concepts.json"
#: MVPTR keeps what 50 captions of its corpus say; that of VinVL, which its loader names, has so many.
PUBLISHED_COUNT, PUBLISHED_CAPTIONS = 50, 8_850_000
LEAST_COUNT = 3

Concept = tuple[str, ...]


@dataclass(frozen=True)
class Concepts:
    """Concepts with their ids and the numbers of training captions that say them, the most frequent first.

    Ids below ``word_pieces`` are those of word pieces. ``captions``: of how many the numbers are; ``min_count``: of how
    many a concept must be.
    """

    ids: Mapping[Concept, int]
    counts: Mapping[Concept, int]
    word_pieces: int
    captions: int
    min_count: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def new(self) -> int:
        """How many have an id of their own: ``word_pieces`` and those that follow."""
        return sum(i >= self.word_pieces for i in self.ids.values())

    @property
    def digest(self) -> str:
        """sha256 of the file."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(self._text())

    @classmethod
    def load(cls, path: Path) -> Concepts:
        """Raises:
        UserError: the file holds something else.
        """
        try:
            found = json.loads(path.read_text())
            concepts = [tuple(map(str, words)) for words in found["concepts"]]
            ids, counts = (dict(zip(concepts, map(int, found[name]), strict=True)) for name in ("ids", "counts"))
            return cls(ids, counts, *(int(found[name]) for name in ("word_pieces", "captions", "min_count")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: holds no concepts ({type(error).__name__}: {error})") from None

    def _text(self) -> str:
        return json.dumps(
            {
                "word_pieces": self.word_pieces,
                "captions": self.captions,
                "min_count": self.min_count,
                "concepts": [list(concept) for concept in self.ids],
                "ids": list(self.ids.values()),
                "counts": [self.counts[concept] for concept in self.ids],
            }
        )


def build_concepts(
    counts: Mapping[Concept, int],
    captions: int,
    config: ConceptsConfig,
    pieces: Callable[[str], Sequence[int]],
    word_pieces: int,
    unknown: int,
) -> Concepts:
    """The concepts of a corpus; the same whatever order they were counted in.

    Args:
        counts: concept -> captions that say it, of so many ``captions``.
        pieces: ids of a single word, of the ``word_pieces`` there are; ``unknown``: that of a word that has none.
    """
    least = config.min_count
    if least is None:
        least = max(LEAST_COUNT, round(PUBLISHED_COUNT * captions / PUBLISHED_CAPTIONS))
    kept: dict[Concept, int] = {}
    ids: dict[Concept, int] = {}
    new = 0
    for concept in sorted(counts, key=lambda c: (-counts[c], c)):
        if counts[concept] < least:
            break
        own = pieces(concept[0]) if len(concept) == 1 else ()
        if len(own) == 1 and own[0] != unknown:
            ids[concept] = own[0]
        elif new < config.most:
            ids[concept] = word_pieces + new
            new += 1
        else:
            continue
        kept[concept] = counts[concept]
    return Concepts(ids, kept, word_pieces, captions, least)


@dataclass(frozen=True)
class Said:
    """The concepts of a caption that have an id, ``ids`` (k,) int64, and which of its n words say each, ``words``
    (k, n) bool.
    """

    ids: np.ndarray
    words: np.ndarray


def said_concepts(phrases: Sequence[Phrase], n_words: int, concepts: Concepts, at_most: int) -> Said:
    """The first ``at_most`` concepts that are known, of which no word comes after the first ``n_words``."""
    known = [p for p in phrases if p.concept in concepts.ids and p.at[-1] < n_words][:at_most]
    words = np.zeros((len(known), n_words), dtype=bool)
    for row, phrase in zip(words, known, strict=True):
        row[list(phrase.at)] = True
    return Said(np.array([concepts.ids[p.concept] for p in known], dtype=np.int64), words)


def mask_concepts(
    said: Said, hidden: np.ndarray, p: float, mask_id: int, concepts: Concepts, rng: np.random.Generator
) -> np.ndarray:
    """(k,) ids of the masked view: [MASK] for every concept with a hidden word, so that none tells what it is; of the
    others each is chosen with probability p, and of the chosen 80 % become [MASK], 10 % a random concept, 10 % stay.

    Source: MVPTR, ``oscar_tsv4.py``, ``random_phrases``. Nobody is asked to recover concepts.

    Args:
        hidden: (n,) bool, words of the caption that were chosen for masking, also those that stay as they are.
    """
    ids, fate = said.ids, rng.random(len(said.ids))
    random_ids = concepts.word_pieces + rng.integers(0, max(1, concepts.new), len(ids))
    masked = np.where(fate < 0.8 * p, mask_id, ids)
    if concepts.new:
        masked = np.where((fate >= 0.8 * p) & (fate < 0.9 * p), random_ids, masked)
    return np.where((said.words & hidden).any(1), mask_id, masked)

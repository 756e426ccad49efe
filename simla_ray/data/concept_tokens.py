"""A text as words and phrase concepts, one sequence: [CLS] words concepts [SEP].

Source: MVPTR, ``oscar_tsv4.py``, ``convert_example_to_features``: [SEP] comes after the concepts, and a caption may
have as many more of them as its words leave places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from simla_ray.config.schema import Concepts as ConceptsConfig
from simla_ray.config.schema import ConceptSource, Run
from simla_ray.data.concepts import Concept, Concepts, Said, build_concepts, mask_concepts, said_concepts
from simla_ray.data.phrases import Phrase, given_phrases, phrases_of
from simla_ray.data.text import Encoded, Vocabulary, clean

#: The column that phrases are read from.
COLUMN = "phrases"


def concept_columns(run: Run) -> tuple[str, ...]:
    """Columns of the row that the concepts of a run come from, beside the captions."""
    return (COLUMN,) if run.text.concepts and run.concepts.source is ConceptSource.column else ()


def column_phrases(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What the column of a row, under our names, says of its captions; nothing where it is empty."""
    return tuple(phrase.get("text") or "" for phrase in row.get(COLUMN) or ())


def phrases_in(words: Sequence[str], given: Iterable[str], config: ConceptsConfig, max_words: int) -> list[Phrase]:
    """The phrases of a caption's words, as ``concepts.source`` says; ``given``: ``column_phrases`` of its row."""
    if config.source is ConceptSource.rules:
        return phrases_of(words)
    return given_phrases(words, (clean(text, max_words) for text in given))


def concepts_for(run: Run, vocabulary: Vocabulary, counts: Mapping[Concept, int], captions: int) -> Concepts:
    """The concepts of so many captions beside a vocabulary's word pieces; ``counts``: see ``build_concepts``."""
    return build_concepts(counts, captions, run.concepts, vocabulary.word_ids, len(vocabulary), vocabulary.unk_id)


class ConceptTokens:
    """Puts the concepts of a caption behind its words.

    Raises:
        ValueError: the vocabulary was built without concepts.
    """

    def __init__(self, run: Run, vocabulary: Vocabulary):
        if vocabulary.concepts is None:
            raise ValueError("the vocabulary has no concepts")
        self.run, self.vocabulary, self.concepts = run, vocabulary, vocabulary.concepts

    def said(self, encoded: Encoded, given: Iterable[str] = ()) -> Said:
        """The concepts of a caption; of words that were cut off there is none. ``given``: see ``phrases_in``."""
        words = [""] * (int(encoded.number[-1]) + 1)
        for number, word in zip(encoded.number[1:].tolist(), encoded.words[1:], strict=True):
            words[number] = word
        text = self.run.text
        phrases = phrases_in(words, given, self.run.concepts, text.max_words)
        return said_concepts(phrases, len(words), self.concepts, text.length - 1 - len(encoded.ids))

    def ids(self, encoded: Encoded, hidden: int | None = None, given: Iterable[str] = ()) -> np.ndarray:
        """(n,) the whole sequence of a caption; of the piece at ``hidden``, which is masked later, no concept tells."""
        said = self.said(encoded, given)
        told = said.words[:, encoded.number[hidden]] if hidden is not None else np.zeros(len(said.ids), dtype=bool)
        return self._sequence(encoded.ids, np.where(told, self.vocabulary.mask_id, said.ids))

    def extend(
        self,
        sample: dict[str, np.ndarray],
        encoded: Encoded,
        row: Mapping[str, Any],
        p: float,
        rng: np.random.Generator,
    ) -> None:
        """Add the concepts to a sample's arrays of text, whose length is ``text.length``: to ``token_ids``,
        ``masked_ids`` where they are there, and ``n_tokens``; ``is_concept`` (L,) bool says where they are.

        Args:
            p: share of the concepts that are masked, beside those of masked words.
        """
        said, n = self.said(encoded, column_phrases(row)), len(encoded.ids)
        tokens = self._sequence(encoded.ids, said.ids)
        sample["token_ids"][: len(tokens)] = tokens
        sample["n_tokens"] = np.int64(len(tokens))
        sample["is_concept"] = np.zeros(self.run.text.length, dtype=bool)
        sample["is_concept"][n : len(tokens) - 1] = True
        if "masked_ids" in sample:
            hidden = np.zeros(said.words.shape[1], dtype=bool)
            hidden[encoded.number[sample["mlm_chosen"][:n]]] = True
            seen = mask_concepts(said, hidden, p, self.vocabulary.mask_id, self.concepts, rng)
            sample["masked_ids"][n : len(tokens)] = [*seen, self.vocabulary.sep_id]

    def _sequence(self, words: np.ndarray, concepts: np.ndarray) -> np.ndarray:
        return np.array([*words, *concepts, self.vocabulary.sep_id], dtype=np.int64)

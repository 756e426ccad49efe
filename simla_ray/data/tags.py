"""Words of the objects in an image, which its tower reads beside the regions: [CLS] words [SEP].

They are inputs of the image side, so they may depend on the image alone: a word of a caption here would let contrast
and matching compare words with words. Source: MVPTR, ``oscar_tsv4.py``; its order of tags is that of a Python set, ours
that of the column, or of the alphabet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from simla_ray.config.schema import Run, TagSource
from simla_ray.data.masking import mask_words
from simla_ray.data.text import Vocabulary, clean

#: Source -> the column that it reads.
COLUMNS = {TagSource.column: "tags", TagSource.box_labels: "box_labels"}


def tag_columns(run: Run) -> tuple[str, ...]:
    """Columns of the row that the tags of a run come from; their source is decided."""
    column = COLUMNS.get(run.tags.source) if run.tags is not None else None
    return (column,) if column is not None else ()


def tags_of(row: Mapping[str, Any], source: TagSource) -> list[str]:
    """Cleaned tags of a row, each once; a row without any has none."""
    if source is TagSource.none:
        return []
    tags = (clean(tag, len(tag)) for tag in row.get(COLUMNS[source]) or ())
    distinct = list(dict.fromkeys(tag for tag in tags if tag))
    return distinct if source is TagSource.column else sorted(distinct)


class TagMaker:
    """Tags of a run's samples, padded to ``tags.max_tokens``."""

    def __init__(self, run: Run, vocabulary: Vocabulary):
        assert run.tags is not None and run.tags.source is not TagSource.auto
        self.config, self.vocabulary = run.tags, vocabulary
        self.mcr = run.objectives.mcr if "mcr" in run.objectives.active() else None

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``tag_ids`` (max_tokens,) int64 and ``n_tags``; with MCR ``masked_tag_ids`` and ``mcr_chosen``
        (max_tokens,).
        """
        ids = self.ids(row)
        sample = {"tag_ids": self._padded(ids), "n_tags": np.int64(len(ids))}
        if self.mcr is not None:
            words, vocabulary = np.arange(len(ids)), self.vocabulary
            inside = (words > 0) & (words < len(ids) - 1)
            masked = mask_words(ids, inside, self.mcr.p, vocabulary.mask_id, len(vocabulary), rng)
            sample |= {"masked_tag_ids": self._padded(masked.ids), "mcr_chosen": self._padded(masked.chosen)}
        return sample

    def ids(self, row: Mapping[str, Any]) -> np.ndarray:
        """(n,) [CLS], the tags' word pieces as far as there is room, [SEP]."""
        text = " ".join(tags_of(row, self.config.source))
        return np.append(self.vocabulary.encode(text, self.config.max_tokens - 1).ids, self.vocabulary.sep_id)

    def _padded(self, values: np.ndarray) -> np.ndarray:
        out = np.zeros(self.config.max_tokens, dtype=values.dtype)  # [PAD] is 0 in every vocabulary we accept
        out[: len(values)] = values
        return out

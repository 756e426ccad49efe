"""Scores of any number of image-caption pairs, in their order, a batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.concept_tokens import column_phrases
from simla_ray.data.decode import DropRow, EncodedImage
from simla_ray.data.regions import WHOLE
from simla_ray.data.sample import Sample
from simla_ray.data.schema import OF_CONCEPTS, OF_REGIONS
from simla_ray.data.text import clean
from simla_ray.errors import UserError
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.scorer import seen as seen_by_tower

#: Pairs of a batch.
PAIRS = 64


@dataclass(frozen=True)
class Pair:
    """A caption of a row. ``image`` is what the reader gave, ``name`` its image_id, of a list the path it names.

    ``columns``: what the image's regions and tags and the caption's concepts are made of.
    """

    uid: str
    name: str
    caption: str
    image: Any
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """``itc``: cosine; ``itm``: probability of a match; None where the run has none, or where the pair is dropped."""

    pair: Pair
    itc: float | None = None
    itm: float | None = None
    dropped: str = ""


def score_pairs(scorer: Scorer, rows: Iterable[Mapping[str, Any]]) -> Iterator[Scored]:
    """Every caption of every row, in order; a row without captions once, as dropped.

    Rows are under our names. What an image that stands for several pairs of a batch gives is computed once. A score
    does not depend on the other pairs beyond rounding: batches follow from the order alone, so the same rows give the
    same numbers.

    Raises:
        UserError: the run has neither ITC nor ITM.
    """
    if not {"itc", "itm"} & scorer.active:
        raise UserError(f"{scorer.run.label} was trained without itc and itm, so it cannot score pairs")
    scorer.eval_mode()
    pairs = _pairs(rows)
    while batch := list(islice(pairs, PAIRS)):
        yield from _score(scorer, batch)


def _pairs(rows: Iterable[Mapping[str, Any]]) -> Iterator[Pair]:
    for row in rows:
        for caption in row["captions"] or [""]:
            columns = {name: row[name] for name in (*OF_REGIONS, *OF_CONCEPTS) if name in row}
            yield Pair(row["uid"], row["image_id"], caption, row["image"], columns)


def _score(scorer: Scorer, batch: list[Pair]) -> list[Scored]:
    limits = scorer.run.text
    views: list[Sample] = []
    seen: dict[Any, int | str] = {}  # image -> its number among the views, or why it is dropped
    reasons, image_index, texts, phrases = [], [], [], []
    for pair in batch:
        # Bytes are one object for all captions of their row; hashing them would cost more.
        key = id(pair.image) if isinstance(pair.image, bytes) else pair.image
        if key not in seen:
            try:
                view = _view(scorer, pair)
                seen[key] = len(views)
                views.append(view)
            except DropRow as drop:
                seen[key] = drop.reason
        found, caption = seen[key], clean(pair.caption, limits.max_words)
        reason = found if isinstance(found, str) else ""
        if not reason and len(scorer.vocabulary.encode(caption, limits.max_tokens).ids) < 2:
            reason = "caption_empty"
        reasons.append(reason)
        if not reason:
            image_index.append(found)
            texts.append(caption)
            phrases.append(column_phrases(pair.columns))
    if not texts:
        return [Scored(pair, dropped=reason) for pair, reason in zip(batch, reasons, strict=True)]
    index = torch.tensor(image_index, device=scorer.device)
    columns: dict[str, list[float]] = {}
    if "itc" not in scorer.active:
        tokens = scorer.image_tokens(seen_by_tower(views))
    else:
        tokens, image_vectors = scorer.encode_images(seen_by_tower(views))
        columns["itc"] = (image_vectors[index] * scorer.encode_texts(texts, phrases=phrases)[2]).sum(1).tolist()
    if "itm" in scorer.active:
        columns["itm"] = scorer.match_logits(tokens, index, *scorer.tokenize(texts, phrases=phrases)).sigmoid().tolist()
    scores = iter([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
    return [
        Scored(pair, dropped=reason) if reason else Scored(pair, **next(scores))
        for pair, reason in zip(batch, reasons, strict=True)
    ]


def _view(scorer: Scorer, pair: Pair) -> Sample:
    """``image`` (3, px, px) uint8, and where the run reads them its regions."""
    decoded = EncodedImage(pair.image, scorer.run.data.max_pixels).rgb()
    view = {"image": to_array(evaluation_view(decoded, scorer.run.vision.image_px))}
    regions, tags = scorer.maker.regions, scorer.maker.tags
    if regions is not None:
        view |= regions(pair.columns, np.array(WHOLE), False)
    return view if tags is None else view | tags(pair.columns, np.random.default_rng(0))

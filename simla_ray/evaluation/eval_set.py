"""The rows an evaluation runs on, and what several tasks read from them: vectors, match logits, true captions."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simla_ray.config.schema import Run
from simla_ray.data.concept_tokens import column_phrases
from simla_ray.data.decode import DropRow, upright_size
from simla_ray.data.sample import Sample
from simla_ray.data.scene import satisfies
from simla_ray.data.text import clean
from simla_ray.errors import UserError
from simla_ray.evaluation.scorer import TEXTS, Images, Scorer, seen
from simla_ray.evaluation.work import Work, chunks_of, interleave, once
from simla_ray.models.reranking import TextStarts

#: Images of a chunk of work.
IMAGES = 32
PICTURE_PX = 192


@dataclass(frozen=True)
class Item:
    """One image with all its captions.

    ``sample`` is that of validation: no augmentation, first caption, masks of epoch 0. ``claims`` belong to
    ``captions`` one by one; None where the row has none. ``aspect`` is width over height of the picture as stored.
    ``label`` is the name of the class that it is of. ``said``, where the run reads concepts from a column: of each
    caption the phrases of its row.
    """

    uid: str
    image_id: str
    sample: Sample
    captions: list[str]
    aspect: float
    second_aspect: float = 1.0
    claims: list[str] | None = None
    scene: str | None = None
    keywords: list[str] | None = None
    phrases: list[dict[str, Any]] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    qas: list[dict[str, Any]] = field(default_factory=list)
    statements: list[dict[str, Any]] = field(default_factory=list)
    label: str | None = None
    said: list[tuple[str, ...]] | None = None

    @property
    def image(self) -> np.ndarray:
        """(3, px, px) uint8"""
        return self.sample["image"]


def load_items(scorer: Scorer, rows: Iterable[Mapping[str, Any]]) -> list[Item | str]:
    """An item for every row, or the reason why it cannot be used; rows are under our names (``data.schema``)."""
    return [_load(scorer, row) for row in rows]


def merge_images(items: Iterable[Item]) -> list[Item]:
    """Rows of one ``image_id`` become one item, the first row's, with the captions and phrases of all."""
    merged: dict[str, Item] = {}
    for item in items:
        first = merged.get(item.image_id)
        merged[item.image_id] = item if first is None else _merge(first, item)
    return list(merged.values())


class EvalSet:
    """Images, captions and distinct texts, numbered; the same on every rank.

    Captions are numbered through all images; equal captions are one text, so that their scores are exactly equal. The
    properties marked ``once`` are collective: every rank reads them, in the same order.
    """

    def __init__(self, scorer: Scorer, work: Work, items: Sequence[Item], n_rows: int, dropped: Mapping[str, int]):
        self.scorer, self.work, self.items = scorer, work, list(items)
        self.n_rows, self.dropped = n_rows, dict(dropped)
        self.captions = [caption for item in self.items for caption in item.captions]
        counts = [len(item.captions) for item in self.items]
        self.image_of_caption = np.repeat(np.arange(len(self.items)), counts)
        self.first_caption = np.cumsum([0, *counts[:-1]])
        number = {text: i for i, text in enumerate(dict.fromkeys(self.captions))}
        self.texts = list(number)
        self.phrases = self._phrases() if scorer.reads_phrases else None
        self.text_of_caption = np.array([number[caption] for caption in self.captions])

    @classmethod
    def load(cls, scorer: Scorer, rows: Sequence[Mapping[str, Any]], work: Work) -> EvalSet:
        """Decode this rank's rows (rank, rank + world, ... of all) and share them. Collective.

        Every rank then holds all images at the tower's size, 0.2 MB each at 256 px.

        Raises:
            UserError: there is no row, or none can be used.
        """
        return cls.of(scorer, load_items(scorer, rows), work)

    @classmethod
    def of(cls, scorer: Scorer, own: Sequence[Item | str], work: Work) -> EvalSet:
        """The same of this rank's rows as ``load_items`` gives them."""
        loaded = interleave(work.gather(own))
        items, dropped = split_dropped(loaded)
        return cls(scorer, work, merge_images(items), len(loaded), dropped)

    @property
    def run(self) -> Run:
        return self.scorer.run

    @property
    def active(self) -> set[str]:
        """Names of the objectives that are on."""
        return self.scorer.active

    def __len__(self) -> int:
        return len(self.items)

    def first(self, n: int) -> EvalSet:
        """The first n images alone."""
        return EvalSet(self.scorer, self.work, self.items[:n], self.n_rows, self.dropped)

    def images(self, numbers: Sequence[int] | np.ndarray, which: str = "image") -> Images:
        """(n, 3, px, px) uint8, with the regions of those that have them; ``which``: image, or second_image of rows
        with two."""
        return seen([self.items[i].sample for i in numbers], which)

    @once
    def image_vectors(self) -> np.ndarray:
        """(images, E) unit rows, float32"""

        def encode(chunk: range) -> np.ndarray:
            return self.scorer.encode_images(self.images(chunk))[1].cpu().numpy()

        return np.concatenate(self.work.map(encode, chunks_of(len(self), IMAGES)))

    @once
    def text_vectors(self) -> np.ndarray:
        """(texts, E) unit rows, float32"""

        def encode(chunk: range) -> np.ndarray:
            phrases = [self.phrases[i] for i in chunk] if self.phrases is not None else None
            return self.scorer.encode_texts([self.texts[i] for i in chunk], phrases=phrases)[2].cpu().numpy()

        return np.concatenate(self.work.map(encode, chunks_of(len(self.texts), TEXTS)))

    @once
    def _match_texts(self) -> TextStarts:
        """All texts, for as many pairs as come."""
        return self.scorer.match_texts(*self.scorer.tokenize(self.texts, phrases=self.phrases))

    def _phrases(self) -> list[tuple[str, ...]]:
        """Of each text what the rows that say it name in it, each once; rows may name different things."""
        found: dict[str, dict[str, None]] = {text: {} for text in self.texts}
        for item in self.items:
            assert item.said is not None
            for caption, said in zip(item.captions, item.said, strict=True):
                found[caption].update(dict.fromkeys(said))
        return [tuple(found[text]) for text in self.texts]

    @once
    def satisfied(self) -> np.ndarray | None:
        """(images, captions) bool, whether a scene of the built-in world makes a caption true; None for other data."""
        if any(item.scene is None or item.claims is None for item in self.items):
            return None
        claims = [claim for item in self.items for claim in item.claims or ()]
        said = [frozenset(v for named in json.loads(claim)["objects"] for v in named.values()) for claim in claims]

        def row(i: int) -> np.ndarray:
            scene = str(self.items[i].scene)
            shown = {obj[key] for obj in json.loads(scene) for key in ("shape", "color", "size")}
            own = self.image_of_caption == i
            # Most captions already name something that is not there at all; parsing them would take most of the time.
            return own | [words <= shown and satisfies(c, scene) for c, words in zip(claims, said, strict=True)]

        return np.stack(self.work.map(row, range(len(self))))

    def match_logits(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """(n,) float32 ITM logit differences of pairs (image, text), by number. Collective.

        The pairs are put in order of their images, and every rank scores whole images: an image is encoded once, and
        its keys and values are projected once, however many captions compete for it, and no tokens travel between
        ranks. What a caption gives alone is computed once as well, and kept: see ``TextStarts``. NaN, of a model that
        has diverged, ranks last.
        """
        pairs, place = np.unique(image * len(self.texts) + text, return_inverse=True)
        owner = pairs // len(self.texts)
        bounds = np.searchsorted(owner, np.arange(0, len(self) + IMAGES, IMAGES))
        chunks = [pairs[a:b] for a, b in pairwise(bounds) if a < b]
        return np.concatenate(self.work.map(self._match_chunk, chunks))[place.ravel()]

    def _match_chunk(self, pairs: np.ndarray) -> np.ndarray:
        images, image = np.unique(pairs // len(self.texts), return_inverse=True)
        tokens = self.scorer.image_tokens(self.images(images))
        logits = self.scorer.match_pairs(tokens, self._match_texts, image, pairs % len(self.texts))
        return np.nan_to_num(logits.cpu().numpy(), nan=-np.inf)

    def derangement(self) -> np.ndarray:
        """(images,) a fixed other image for each, drawn as one random cycle."""
        order = np.random.default_rng(0).permutation(len(self))
        wrong = np.empty_like(order)
        wrong[order] = np.roll(order, -1)
        return wrong

    def picture(self, i: int, which: str = "image") -> dict[str, str]:
        """``{which: base64 JPEG}``, as the tower sees it but in its own aspect; empty without ``report.images``."""
        if not self.run.report.images:
            return {}
        item = self.items[i]
        shown = Image.fromarray(item.sample[which].transpose(1, 2, 0))
        side = min(PICTURE_PX, max(shown.size))
        aspect = item.aspect if which == "image" else item.second_aspect
        width, height = min(1.0, aspect) * side, min(1.0, 1 / aspect) * side
        shown = shown.resize((max(1, round(width)), max(1, round(height))), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        shown.save(out, "JPEG", quality=88, subsampling=0)
        return {which: base64.b64encode(out.getvalue()).decode()}


def split_dropped(loaded: Iterable[Item | str]) -> tuple[list[Item], dict[str, int]]:
    """The usable items, and how many rows were dropped for which reason.

    Raises:
        UserError: nothing is left.
    """
    items: list[Item] = []
    reasons: Counter[str] = Counter()
    for item in loaded:
        if isinstance(item, Item):
            items.append(item)
        else:
            reasons[item] += 1
    if not items:
        why = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())) or "there are none"
        raise UserError(f"data.test, data.val: no row can be evaluated ({why})")
    return items, dict(sorted(reasons.items()))


def _load(scorer: Scorer, row: Mapping[str, Any]) -> Item | str:
    try:
        sample = scorer.maker(row, 0)
    except DropRow as drop:
        return drop.reason
    raw = [str(c or "") for c in row["captions"]]
    cleaned = [clean(caption, scorer.run.text.max_words) for caption in raw]
    claims = list(row["claims"]) if row.get("claims") else None
    if claims is not None:
        claims = [claim for claim, caption in zip(claims, cleaned, strict=True) if caption]
    captions = [caption for caption in cleaned if caption]
    return Item(
        uid=row["uid"],
        image_id=row["image_id"],
        sample=sample,
        captions=captions,
        aspect=_aspect(row["image"]),
        second_aspect=_aspect(row["images"][1]) if "second_image" in sample else 1.0,
        claims=claims,
        scene=row.get("scene"),
        keywords=list(row["keywords"]) if row.get("keywords") is not None else None,
        phrases=list(row.get("phrases") or ()),
        boxes=list(row.get("boxes") or ()),
        qas=list(row.get("qas") or ()),
        statements=list(row.get("statements") or ()),
        label=_label(row.get("label")),
        said=[column_phrases(row)] * len(captions) if scorer.reads_phrases else None,
    )


def _merge(first: Item, other: Item) -> Item:
    claims = None
    if first.claims is not None and other.claims is not None:
        claims = [*first.claims, *other.claims]
    keywords = None
    if first.keywords is not None or other.keywords is not None:
        keywords = [*(first.keywords or ()), *(other.keywords or ())]
    return replace(
        first,
        captions=[*first.captions, *other.captions],
        claims=claims,
        keywords=keywords,
        phrases=[*first.phrases, *other.phrases],
        qas=[*first.qas, *other.qas],
        statements=[*first.statements, *other.statements],
        label=first.label if first.label is not None else other.label,
        said=[*first.said, *other.said] if first.said is not None and other.said is not None else None,
    )


def _label(value: Any) -> str | None:
    """A class as text; None where there is none, for a structure names nothing."""
    if value is None or value != value or isinstance(value, Mapping | list | bytes):
        return None
    return str(value).strip() or None


def _aspect(image: bytes | Path) -> float:
    """Width over height, turned as EXIF says; from the header alone."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        width, height = upright_size(opened)
    return width / height

"""One row -> the arrays of one training sample: decode, augment, tokenise, mask.

Nothing else touches pictures or captions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simla_ray.config.schema import Augment, CodesKind, Flip, MimCrop, Run
from simla_ray.data.augment import draw_view, evaluation_view, reduction_for, render_view, to_array
from simla_ray.data.concept_tokens import ConceptTokens
from simla_ray.data.decode import DropRow, EncodedImage
from simla_ray.data.draws import rng_for, stable_hash
from simla_ray.data.masking import mask_patches, mask_words
from simla_ray.data.questions import Asker
from simla_ray.data.regions import WHOLE, RegionMaker
from simla_ray.data.tags import TagMaker
from simla_ray.data.text import (
    Encoded,
    Vocabulary,
    clean,
    keyword_candidates,
    keyword_prior,
    load_stop_words,
    names_a_side,
)

Sample = dict[str, np.ndarray]


@dataclass(frozen=True)
class Picture:
    image: np.ndarray  # (3, px, px) uint8
    code_image: np.ndarray | None  # (3, code_px, code_px) uint8, where the codes are read from another picture
    crop: tuple[float, ...] = WHOLE  # what it shows of the image, in shares
    flipped: bool = False


class SampleMaker:
    """Makes samples of a run; one per process.

    Args:
        training: False gives the fixed samples of validation: no augmentation, first caption, masks of epoch 0.
    """

    #: How much a JPEG is reduced while it is decoded.
    reduction = staticmethod(reduction_for)

    def __init__(self, run: Run, vocabulary: Vocabulary, *, training: bool):
        self.run, self.vocabulary, self.training = run, vocabulary, training
        self.on = run.objectives.active()
        psl = run.objectives.psl
        self.stop_words = load_stop_words(psl.stop_words) if psl is not None and "psl" in self.on else frozenset()
        self.code_px = code_image_px(run)
        self.concepts = ConceptTokens(run, vocabulary) if run.text.concepts else None
        self.ask = Asker(run, vocabulary, training=training)
        self.regions = RegionMaker(run) if run.regions is not None else None
        self.tags = TagMaker(run, vocabulary) if run.tags is not None else None
        self.pictures = run.objectives.labels.pictures if self.ask.labels is not None else 1  # type: ignore[union-attr]

    def __call__(self, row: Mapping[str, Any], epoch: int, time: int = 0) -> Sample:
        """The arrays of a row (shapes without the batch axis; text padded to ``text.length``).

        ``epoch`` and ``time``: see ``rng_for``.

        Raises:
            DropRow: caption_empty, those of ``Asker``, ``EncodedImage`` and ``RegionMaker``, or the reader's reason.
        """
        if isinstance(row["image"], str):  # the reader's reason comes before what follows from it
            raise DropRow(row["image"])
        rng = rng_for(self.run.seed, epoch, row["uid"], time)
        target: Sample = {}
        if self.ask.asks:
            asked = self.ask(row, rng)
            caption, encoded, target = asked.said, asked.encoded, asked.target
        else:
            caption, encoded = self._caption(row["captions"], rng)
        picture = self._picture(row["image"], caption, rng)
        sample = {"image": picture.image, "image_id": np.int64(stable_hash(row["image_id"])), **target}
        if self.pictures == 2:
            sample["second_image"] = self._picture(_second(row), caption, rng).image
        if picture.code_image is not None:
            sample["code_image"] = picture.code_image
        sample |= self._text(encoded, row, rng)
        mim = self.run.objectives.mim
        if mim is not None and "mim" in self.on:
            grid = self.run.grid
            sample["patch_mask"] = mask_patches(grid, int(mim.mask_ratio * grid**2), rng)
        if self.regions is not None:
            sample |= self.regions(row, np.array(picture.crop), picture.flipped)
            sample |= self.regions.hidden(sample, rng)
        if self.tags is not None:
            sample |= self.tags(row, rng)
        return sample

    def _caption(self, captions: Sequence[str], rng: np.random.Generator) -> tuple[str, Encoded]:
        """One cleaned caption: drawn in training, the first in validation; one without a token gives way."""
        order = rng.permutation(len(captions)) if self.training else range(len(captions))
        for i in order:
            if caption := clean(captions[i], self.run.text.max_words):
                encoded = self.vocabulary.encode(caption, self.run.text.max_tokens)
                if len(encoded.ids) > 1:
                    return caption, encoded
        raise DropRow("caption_empty")

    def _picture(self, image: Any, caption: str, rng: np.random.Generator) -> Picture:
        data, px = self.run.data, self.run.vision.image_px
        encoded = EncodedImage(image, data.max_pixels)
        if not self.training or (self.regions is not None and self.regions.whole_view):
            decoded = encoded.rgb()
            plain = to_array(evaluation_view(decoded, self.code_px)) if self.code_px else None
            return Picture(to_array(evaluation_view(decoded, px)), plain)
        may_flip = data.hflip is Flip.always or (data.hflip is Flip.caption_safe and not names_a_side(caption))
        mim = self.run.objectives.mim
        independent = bool(self.code_px) and mim is not None and mim.crop is MimCrop.independent
        wanted = [
            (draw_view(encoded.size, data, may_flip, rng), side) for side in (px, *([self.code_px] * independent))
        ]
        decoded, boxes = encoded.reduced(self.reduction(wanted), [drawn.box for drawn, _ in wanted])
        parts = zip(boxes, wanted, strict=True)
        view, *other = [render_view(decoded, box, side, drawn) for box, (drawn, side) in parts]
        shown = to_array(view.image)
        if not self.code_px:
            drawn, scale = wanted[0][0], np.tile(encoded.size, 2)
            return Picture(shown, None, tuple(np.array(drawn.box) / scale), drawn.flipped)
        if other:
            return Picture(shown, to_array(other[0].image))
        of_codes = view.plain if self.code_px == px else evaluation_view(view.plain, self.code_px)
        return Picture(shown, shown if of_codes is view.image else to_array(of_codes))

    def _text(self, encoded: Encoded, row: Mapping[str, Any], rng: np.random.Generator) -> Sample:
        vocabulary = self.vocabulary
        n, length = len(encoded.ids), self.run.text.length
        out: Sample = {
            "n_tokens": np.int64(n),
            "token_ids": _pad(encoded.ids, length, vocabulary.pad_id),
            "truncated": np.bool_(encoded.truncated),
            "word_start": _pad(encoded.word_start, length, 0),
        }
        mlm, psl = self.run.objectives.mlm, self.run.objectives.psl
        if mlm is not None and "mlm" in self.on:
            maskable = encoded.ids != vocabulary.cls_id
            starts = encoded.word_start if mlm.whole_word else None
            masked = mask_words(encoded.ids, maskable, mlm.p, vocabulary.mask_id, len(vocabulary), rng, starts)
            out["masked_ids"] = _pad(masked.ids, length, vocabulary.pad_id)
            out["mlm_chosen"] = _pad(masked.chosen, length, False)
        if self.concepts is not None:
            self.concepts.extend(out, encoded, row, mlm.p if mlm is not None else 0.0, rng)
        if psl is not None and "psl" in self.on:
            ok = keyword_candidates(encoded, psl, self.stop_words, vocabulary.special_ids)
            out["keyword_ok"] = _pad(ok, length, not psl.exclude_special)
            out["keyword_prior"] = _pad(keyword_prior(encoded, psl, vocabulary.frequency, rng), length, 0.0)
        return out


def _second(row: Mapping[str, Any]) -> Any:
    images = row.get("images") or ()
    if len(images) != 2:
        raise DropRow("images_not_two")
    return images[1]


def stacked(samples: Sequence[Sample]) -> Sample:
    """The samples' arrays, stacked by name. A picture for the codes that is the tower's own is kept once: ``code_row``
    says which of ``code_image`` a sample has, -1 for its ``image``.
    """
    names = [name for name in samples[0] if name != "code_image"]
    block = {name: np.stack([s[name] for s in samples]) for name in names}
    if "code_image" in samples[0]:
        others = [s["code_image"] for s in samples if s["code_image"] is not s["image"]]
        block["code_image"] = np.stack(others) if others else np.empty((0, *samples[0]["code_image"].shape), np.uint8)
        rows = itertools.count()
        block["code_row"] = np.array([next(rows) if s["code_image"] is not s["image"] else -1 for s in samples])
    return block


def joined(runs: Sequence[tuple[Sample, int, int]]) -> Sample:
    """Samples [start, stop) of stacked ones, several such runs in one; of a single run views, not copies."""
    (first, start, stop), *more = runs
    found = {n: v if n == "code_image" else v[start:stop] for n, v in first.items()}
    for block, start, stop in more:
        if "code_row" in block:
            rows = block["code_row"][start:stop]
            rows = np.where(rows >= 0, rows + len(found["code_image"]), -1)
            block = block | {"code_row": np.concatenate([block["code_row"][:start], rows])}
        cut = {n: v if n == "code_image" else v[start:stop] for n, v in block.items()}
        found = {n: np.concatenate([v, cut[n]]) for n, v in found.items()}
    return found


def code_image_px(run: Run) -> int:
    """Side of the picture the visual codes are read from; 0 where it is the tower's own picture,
    or there are no codes.
    """
    mim = run.objectives.mim
    if mim is None or "mim" not in run.objectives.active():
        return 0
    if run.codes.kind is CodesKind.dvae:
        return 8 * run.grid
    if run.data.augment is Augment.full or mim.crop is MimCrop.independent:
        return run.vision.image_px
    return 0


def _pad(values: np.ndarray, length: int, fill: Any) -> np.ndarray:
    out = np.full(length, fill, dtype=values.dtype)
    out[: len(values)] = values
    return out

"""What a task does to the rows it writes: regions and tags by a trained model, phrases by rules."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from simla_ray.config.enums import RegionSource, VisionSource
from simla_ray.config.schema import Run
from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.convert.annotation import Added
from simla_ray.data.decode import DropRow, decode
from simla_ray.data.phrases import is_noun, noun_lemma, phrase_texts
from simla_ray.data.regions import WHOLE, boxes_of, grid_boxes, in_view
from simla_ray.data.text import Vocabulary, clean, load_stop_words
from simla_ray.errors import UserError
from simla_ray.evaluation.keywords import Candidates
from simla_ray.evaluation.scorer import Scorer
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast
from simla_ray.models.regions import RegionFeatures
from simla_ray.release.source import Source, find_source, trained_model

#: Pictures that pass through the tower together.
BATCH = 32
#: Regions of a picture; where one of them has more, fewer pictures pass together.
MANY = 100
#: Words of a caption that are read at most.
MAX_WORDS = 200
#: What tags and phrases add to a row, about.
TEXT_BYTES = 500


@dataclass(frozen=True)
class Words:
    """The words that may be tags, with the share of captions that say each, and whose captions these are.

    ``restricted``: what they are kept to, nouns or the list of ``objectives.psl.vocab``.
    """

    frequency: dict[str, float]
    counted: str
    restricted: str
    allowed: frozenset[str] | None

    @classmethod
    def of(cls, source: Source) -> Words:
        """Those of the run's training captions; none where it brings no counts, as an official file's.

        Raises:
            UserError: the run has no keyword head.
        """
        run = source.run
        assert run is not None
        if run.objectives.psl is None or "psl" not in run.objectives.active():
            raise UserError(
                f"--run: {source.name} was trained without psl, so it has no keyword head to find tags with"
            )
        if run.regions is not None and run.regions.source is RegionSource.column:
            raise UserError(f"--run: {source.name} reads region_feats, so it finds no tags in a picture alone")
        listed = run.objectives.psl.vocab
        allowed = load_stop_words(str(listed)) if listed is not None else None
        restricted = "nouns" if allowed is None else "objectives.psl.vocab"
        return cls(source.vocabulary().frequency, "run", restricted, allowed)

    def candidates(self, run: Run, vocabulary: Vocabulary) -> Candidates:
        """Words that may be tags, that are no stop words, and that the vocabulary can spell."""
        psl, allowed = run.objectives.psl, self.allowed
        kept = {w: f for w, f in self.frequency.items() if (is_noun(w) if allowed is None else w in allowed)}
        stop_words = load_stop_words((psl.stop_words if psl is not None else None) or "en")
        return Candidates.of(Vocabulary(vocabulary.tokenizer, kept), stop_words)

    def about(self) -> dict[str, Any]:
        """For the manifest."""
        text = "\n".join(f"{word} {share!r}" for word, share in sorted(self.frequency.items()))
        return {
            "document_frequency": f"captions of the {self.counted}",
            "words": len(self.frequency),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "restricted_to": self.restricted,
        }


class Regions:
    """Features of the regions of pictures, as a training with ``regions.features=tower`` makes them of the run's tower.

    Raises:
        UserError: the run's images have no tower of their own.
    """

    def __init__(self, run: Run, model: Model, grid: int, device: torch.device):
        if run.vision.source is not VisionSource.vit:
            raise UserError(
                f"--run: {run.label} has no image tower of its own (vision.source={run.vision.source}), so it gives no "
                "features of regions"
            )
        self.features = RegionFeatures(model.student.vision).to(device)
        self.cells, self.device = grid_boxes(grid), device

    def columns(self, row: dict[str, Any]) -> dict[str, Any]:
        """``boxes`` of the row's regions, its boxes and the whole image or cells, and ``box_labels`` where it has them.

        Raises:
            DropRow: boxes_unreadable, box_labels_unlike_boxes.
        """
        labels = row.get("box_labels")
        if not row.get("boxes"):
            unlabelled = {"box_labels": [""] * len(self.cells)} if labels == [] else {}
            return {"boxes": self.cells.tolist(), **unlabelled}
        given = boxes_of(row)
        boxes, which = in_view(given, np.array(WHOLE), False)
        if labels is None:
            return {"boxes": boxes.tolist()}
        if len(labels) != len(given):
            raise DropRow("box_labels_unlike_boxes")
        return {"boxes": boxes.tolist(), "box_labels": ["" if i < 0 else labels[i] for i in which]}

    def __call__(self, views: np.ndarray, boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """views (n, 3, px, px) uint8 and the boxes of each -> for each (R, d), rounded to float16."""
        padded = np.zeros((len(boxes), max(map(len, boxes)), 4), np.float32)
        for row, own in zip(padded, boxes, strict=True):
            row[: len(own)] = own
        images, places = (torch.from_numpy(array).to(self.device) for array in (views, padded))
        at_once = max(1, BATCH * MANY // places.shape[1])
        parts = [self.features(*part) for part in zip(images.split(at_once), places.split(at_once), strict=True)]
        features = torch.cat(parts).half().float().cpu().numpy()
        return [of_image[: len(own)] for of_image, own in zip(features, boxes, strict=True)]


class Tagger:
    """Words of what pictures show, by PSL's keyword head, the teacher's where there is one.

    A word's score is the log of its probability less that of its share of the captions, so that words which are likely
    in any picture do not win. Tags are the highest of those that the picture makes likelier than they are in a caption,
    a score above 0, and no less probable than ``threshold``, for a rare word's score is soon high; of words with one
    lemma the higher. Captions are not read.
    """

    def __init__(self, scorer: Scorer, candidates: Candidates, most: int, threshold: float):
        self.scorer, self.candidates, self.most, self.threshold = scorer, candidates, most, threshold
        self.lemmas = [noun_lemma(word) for word in candidates.words]
        self.log_share = torch.from_numpy(np.log(candidates.frequency)).float()

    @torch.no_grad()
    def __call__(self, views: np.ndarray) -> list[list[str]]:
        """views (n, 3, px, px) uint8 -> tags of each, the highest first, equal ones by name."""
        scorer = self.scorer
        vectors = scorer.encode_images(views, towers=scorer.teacher)[1]
        with autocast(scorer.run, scorer.device):
            logits = scorer.teacher.concept_head(vectors)
        log_p = logsigmoid(self.candidates.scores(logits)).cpu()
        scores = log_p - self.log_share
        fits = (scores > 0) & (log_p.exp() >= self.threshold)
        return [self._best(row, ok) for row, ok in zip(scores.numpy(), fits.numpy(), strict=True)]

    def _best(self, scores: np.ndarray, fits: np.ndarray) -> list[str]:
        """Candidates are in alphabetical order, and the order of equal scores stays."""
        found: dict[str, str] = {}
        there = np.flatnonzero(fits)
        for i in there[np.argsort(-scores[there], kind="stable")]:
            found.setdefault(self.lemmas[i], self.candidates.words[i])
        return list(found.values())[: self.most]


class Annotators:
    """Rows as they are written in, what is added to each out; made once in a process.

    A row with two pictures gets no regions and no tags: they would be of one of them.

    Args:
        names: of regions, tags and phrases.
        folder: checkpoint or exported folder; None for phrases alone.
        words: for tags.

    Raises:
        UserError: the weights do not fit, or lack what is asked of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None,
        grid: int,
        tags: int,
        threshold: float,
        words: Words | None,
        max_pixels: int,
    ):
        self.phrases, self.max_pixels = "phrases" in names, max_pixels
        self.regions: Regions | None = None
        self.tags: Tagger | None = None
        if folder is None:
            return
        source = find_source(folder)
        run, vocabulary = source.run, source.vocabulary()
        assert run is not None
        self.px = run.vision.image_px
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = trained_model(run, vocabulary, source.read(), source.file).requires_grad_(False).to(device)
        if "regions" in names:
            self.regions = Regions(run, model, grid, device)
        if words is not None:
            scorer = Scorer(run, model, vocabulary, device)
            self.tags = Tagger(scorer, words.candidates(run, vocabulary), tags, threshold)

    @property
    def row_bytes(self) -> int:
        """About what is added to a row; of regions as many as there are cells."""
        regions = self.regions
        return TEXT_BYTES + (2 * regions.features.width * len(regions.cells) if regions is not None else 0)

    def __call__(self, rows: list[dict[str, Any]]) -> list[Added | str]:
        """Reasons: those of ``Regions.columns``, and region_feats_unreadable for features beyond float16."""
        found: list[Added | str] = []
        for start in range(0, len(rows), BATCH):
            found += self._batch(rows[start : start + BATCH])
        return found

    def _batch(self, rows: list[dict[str, Any]]) -> list[Added | str]:
        found: list[Added | str] = []
        for row in rows:
            try:
                found.append(self._told(row))
            except DropRow as drop:
                found.append(drop.reason)
        seen = [(row, added) for row, added in zip(rows, found, strict=True)
                if row.get("image") is not None and not isinstance(added, str)]  # fmt: skip
        if not seen or (self.regions is None and self.tags is None):
            return found
        views = np.stack([to_array(evaluation_view(decode(row["image"], self.max_pixels), self.px)) for row, _ in seen])
        if self.tags is not None:
            for (_, added), tags in zip(seen, self.tags(views), strict=True):
                added.columns["tags"] = tags
                added.counts.update(tags=len(tags), rows_without_tags=int(not tags))
        if self.regions is not None:
            boxes = [np.array(added.columns["boxes"], np.float32) for _, added in seen]
            for (_, added), features in zip(seen, self.regions(views, boxes), strict=True):
                added.columns["region_feats"] = list(features)
        return [
            "region_feats_unreadable"
            if not isinstance(added, str) and not np.isfinite(added.columns.get("region_feats", 0)).all()
            else added
            for added in found
        ]

    def _told(self, row: dict[str, Any]) -> Added:
        """What a row has without a look at its picture.

        Raises:
            DropRow: see ``Regions.columns``.
        """
        columns: dict[str, Any] = {}
        counts: dict[str, int] = {}
        pictured = row.get("image") is not None
        if self.regions is not None and pictured:
            columns |= self.regions.columns(row)
            cells = int(not row.get("boxes"))
            counts |= {"regions": len(columns["boxes"]), "rows_without_boxes": cells, "rows_without_regions": 0}
        elif self.regions is not None:
            counts |= {"regions": 0, "rows_without_regions": 1}
        if self.tags is not None:
            counts |= {"tags": 0, "rows_without_tags": 1}  # for now
        if self.phrases:
            given = row.get("phrases") or []
            known = {clean(phrase["text"] or "", MAX_WORDS) for phrase in given}
            said = [text for c in row["captions"] if c for text in phrase_texts(clean(c, MAX_WORDS).split())]
            more = [{"text": text, "boxes": None} for text in dict.fromkeys(said) if text not in known]
            columns["phrases"] = given + more
            counts |= {"phrases": len(more), "rows_without_phrases": int(not columns["phrases"])}
        return Added(columns, counts)

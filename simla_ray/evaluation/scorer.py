"""A trained model as the tasks see it: pictures and texts in; tokens, vectors and match logits out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from simla_ray.config.schema import Run
from simla_ray.data.collate import regions_of, tags_of
from simla_ray.data.concept_tokens import concept_columns
from simla_ray.data.questions import answer_ids
from simla_ray.data.sample import Sample, SampleMaker
from simla_ray.data.text import Vocabulary, clean
from simla_ray.models.model import Model, Towers
from simla_ray.models.precision import autocast
from simla_ray.models.reranking import PAIRS, TextStarts, fused_cls, merged_cls
from simla_ray.models.stack import Attentions

IMAGES, TEXTS = 64, 256
#: Pictures (n, 3, px, px) uint8; or with their regions, under the names of ``Batch``.
Images = np.ndarray | Tensor | Mapping[str, Tensor]


def seen(samples: Sequence[Sample], which: str = "image") -> Images:
    """What a tower reads of samples: their pictures, with the regions of those that have them."""
    images = np.stack([sample[which] for sample in samples])
    if "region_boxes" not in samples[0] or which != "image":
        return images
    names = ("region_boxes", "n_regions", "regions", "tag_ids", "n_tags")
    column = {name: np.stack([sample[name] for sample in samples]) for name in names if name in samples[0]}
    tags = {name: ids for name, ids in tags_of(column).items() if name == "tag_ids"}
    return {"image": torch.from_numpy(images), **regions_of(column), **tags}


class Scorer:
    """Runs a model in evaluation mode and in the run's precision, on the student's weights unless said.

    Every method takes all its rows at once and works through them in batches. The model is put into evaluation mode
    here; whoever trains it in between calls ``eval_mode`` before the next use.
    """

    def __init__(self, run: Run, model: Model, vocabulary: Vocabulary, device: torch.device):
        self.run, self.model, self.vocabulary, self.device = run, model, vocabulary, device
        self.active = set(run.objectives.active())
        self.maker = SampleMaker(run, vocabulary, training=False)
        self.eval_mode()

    def eval_mode(self) -> None:
        self.model.eval()

    @property
    def teacher(self) -> Towers:
        """The teacher's float32 towers; without a teacher the student's."""
        return self.model.teacher.master if self.model.teacher is not None else self.model.student  # type: ignore[return-value]

    @cached_property
    def answer_table(self) -> Tensor:
        """(K, A) int64: the known answers as a decoder writes them, see ``questions.answer_ids``; on the device."""
        answers, vocabulary = self.run.objectives.answers, self.vocabulary
        assert answers is not None
        table = np.stack([answer_ids(vocabulary, name, answers.max_tokens) for name in vocabulary.answers])
        return torch.from_numpy(table[:, : int((table != vocabulary.pad_id).sum(1).max())]).to(self.device)

    @torch.no_grad()
    def encode_images(
        self, images: Images, batch_size: int = IMAGES, towers: Towers | None = None
    ) -> tuple[Tensor, Tensor]:
        """images (n, 3, px, px) uint8 -> tokens (n, N, D), unit vectors (n, E) float32, both on the device."""
        towers = towers if towers is not None else self.model.student
        tokens, vectors = [], []
        for part in self._token_batches(images, batch_size, towers):
            tokens.append(part)
            with autocast(self.run, self.device):
                vectors.append(towers.image_vector(part))
        return torch.cat(tokens), torch.cat(vectors)

    @torch.no_grad()
    def image_tokens(self, images: Images, batch_size: int = IMAGES) -> Tensor:
        """images (n, 3, px, px) uint8 -> tokens (n, N, D), where nobody asks for vectors."""
        return torch.cat(list(self._token_batches(images, batch_size, self.model.student)))

    def _token_batches(self, images: Images, batch_size: int, towers: Towers) -> Iterator[Tensor]:
        whole = images if isinstance(images, Mapping) else {"image": torch.as_tensor(images)}
        if self.maker.tags is not None and "tag_ids" not in whole:  # pictures alone have none
            none = torch.from_numpy(self.maker.tags.ids({}))
            whole = {**whole, "tag_ids": none.expand(len(whole["image"]), -1)}
        for start in range(0, len(whole["image"]), batch_size):
            part = {name: t[start : start + batch_size].to(self.device) for name, t in whole.items()}
            with autocast(self.run, self.device):
                tokens = towers.vision(**part)
            yield tokens

    @property
    def reads_phrases(self) -> bool:
        """Whether phrase concepts are those that a column names, so that ``tokenize`` must be told them."""
        return bool(concept_columns(self.run))

    def tokenize(
        self,
        texts: Sequence[str],
        hidden: Sequence[int] | None = None,
        phrases: Sequence[Sequence[str]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Texts, cleaned or not -> ids (n, L) int64, mask (n, L) bool, on the device; L is that of the longest.

        Args:
            hidden: of each text a position that the caller masks, so that no phrase concept may tell its word.
            phrases: of each text those that its row's column names, read where ``reads_phrases``; None: a text that is
                of no row, and has no concepts there.
        """
        limits = self.run.text
        encoded = [self.vocabulary.encode(clean(t, limits.max_words), limits.max_tokens) for t in texts]
        concepts = self.maker.concepts
        rows = [one.ids for one in encoded]
        if concepts is not None:
            at = hidden if hidden is not None else [None] * len(encoded)
            given = phrases if phrases is not None else [()] * len(encoded)
            rows = [concepts.ids(*each) for each in zip(encoded, at, given, strict=True)]
        ids = np.full((len(rows), max(map(len, rows))), self.vocabulary.pad_id)
        mask = np.zeros(ids.shape, dtype=bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    @torch.no_grad()
    def encode_texts(
        self, texts: Sequence[str], batch_size: int = TEXTS, phrases: Sequence[Sequence[str]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Texts -> ids (n, L), mask (n, L), unit vectors (n, E) float32; ``phrases``: see ``tokenize``."""
        ids, mask = self.tokenize(texts, phrases=phrases)
        student, vectors = self.model.student, []
        for part, part_mask in zip(ids.split(batch_size), mask.split(batch_size), strict=True):
            with autocast(self.run, self.device):
                vectors.append(student.text_vector(student.text.encode(part, part_mask)))
        return ids, mask, torch.cat(vectors)

    def fuse(
        self, image_tokens: Tensor, image_index: Tensor, ids: Tensor, mask: Tensor, keep: Attentions | None = None
    ) -> Tensor:
        """Texts with images -> the words' states (n, L, D); see ``Towers.fuse``.

        The one method with gradients, where the caller has switched them on.
        """
        with autocast(self.run, self.device):
            return self.model.student.fuse(image_tokens, image_index, ids, mask, keep)

    def match_texts(self, ids: Tensor, mask: Tensor) -> TextStarts:
        """Texts, ids (n, L) and mask (n, L), as ``match_pairs`` takes them; each runs once for all pairs it is in."""
        return TextStarts(self.model.student.text, ids, mask)

    @torch.no_grad()
    def match_pairs(
        self, image_tokens: Tensor, texts: TextStarts, image: np.ndarray, text: np.ndarray, batch_size: int = PAIRS
    ) -> Tensor:
        """(n,) float32: ITM's logit of a match less that of a mismatch, for n > 0 pairs of an image and a text.

        ``image`` and ``text`` (n,) are rows of image_tokens (m, N, D) and of ``texts``, in any order.
        """
        towers = self.model.student
        with autocast(self.run, self.device):
            if towers.merging is not None:
                cls = merged_cls(towers, image_tokens, texts, image, text, batch_size)
            else:
                cls = fused_cls(image_tokens, texts, image, text, batch_size)
            two = self.model.match(cls).float()
        return two[:, 1] - two[:, 0]

    @torch.no_grad()
    def match_logits(
        self, image_tokens: Tensor, image_index: Tensor, ids: Tensor, mask: Tensor, batch_size: int = PAIRS
    ) -> Tensor:
        """``match_pairs`` with the tokens of each pair's text, ids (n, L) and mask (n, L); equal ones run once."""
        rows = ids.masked_fill(~mask, -1).cpu().numpy()
        _, first, text = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        distinct = torch.from_numpy(first).to(ids.device)
        texts = self.match_texts(ids[distinct], mask[distinct])
        return self.match_pairs(image_tokens, texts, image_index.cpu().numpy(), text.ravel(), batch_size)

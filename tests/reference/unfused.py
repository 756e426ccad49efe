"""The step as the official code (codezakh/SIMLA) makes it, for comparing losses and gradients, and for timing.

It runs on the weights of our ``Model`` with maths of its own. Each pass is one call that computes every layer and every
position; the image is projected to keys and values anew in every pass and layer. Passes of a full SIMLA step, in units
of B sequences:

    student  vision 1 + 1    text 1    text over image 1 (matched) + 2 (negatives) + 1 (MLM)    image over text 1
    teacher  vision 1 + 1    text 1    text over image 1 (MLM) + 1 (keywords)                   image over text 1

Layers without a cross-attention below layers with one make it ALBEF's step: fusion starts from text-only states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simla_ray.config.schema import KeywordSelect, MimTeacherText, Recommend, Run, SameImage, Side, SoftDim
from simla_ray.models.forward import Negatives
from simla_ray.models.model import Model
from simla_ray.types import Batch
from tests.reference import layers, losses
from tests.reference.layers import linear, unit_rows


@dataclass
class Seen:
    """What the towers gave for a micro-batch; None where no objective asks for it."""

    image: Tensor | None = None  # (B, N, D) student, clean
    text: Tensor | None = None  # (B, L, D) student, text-only
    vectors: tuple[Tensor, Tensor] | None = None  # (B, E) image and text, student
    keys: tuple[Tensor, Tensor] | None = None  # (B, E) image and text, teacher (student without one)
    image_vec: Tensor | None = None  # (B, E)
    image_key: Tensor | None = None  # (B, E)
    teacher_image: Tensor | None = None  # (B, N, D) teacher, clean
    keyword_attention: Tensor | None = None  # (B, H, L), from the matched pass where the run takes it there


class Unfused(nn.Module):
    """Forward and losses of a micro-batch. The teacher is its float32 master, whatever copy our step keeps."""

    def __init__(
        self,
        run: Run,
        model: Model,
        codes: nn.Module | None,
        cls_id: int,
        keyword_columns: Tensor | None = None,
        *,
        sdpa: bool = False,
    ):
        super().__init__()
        self.run, self.model, self.codes, self.cls_id, self.sdpa = run, model, codes, cls_id, sdpa
        itc = run.objectives.itc
        if itc is not None and getattr(itc, "loss", "softmax") != "softmax":
            raise NotImplementedError(f"objectives.itc.loss: the reference has no {itc.loss}")
        self.register_buffer("keyword_columns", keyword_columns, persistent=False)
        self.image_key: Tensor | None = None  # (B, E) keys of the last micro-batch, for the queue
        self.text_key: Tensor | None = None

    @property
    def student(self) -> nn.Module:
        return self.model.student

    @property
    def teacher(self) -> nn.Module | None:
        return self.model.teacher.master if self.model.teacher is not None else None

    def losses(
        self,
        batch: Batch,
        active: set[str],
        alphas: dict[str, float],
        *,
        itm_eps: float = 0.0,
        given: Negatives | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> weighted total and the unweighted loss of every active objective. ``given`` replays fixed negatives."""
        seen = self._towers(batch, active)
        self.image_key, self.text_key = seen.keys if seen.keys is not None else (None, None)
        found: dict[str, Tensor] = {}
        similarity = None
        if "itc" in active:
            found["itc"], similarity = self._contrast(batch, seen, alphas["itc"])
        if "itm" in active:
            image, text = self._negatives(batch, seen, similarity, itm_eps, given)
            found["itm"] = self._matching(batch, seen, image, text, keep="psl" in active and self._attends_in_matched())
        if "mlm" in active:
            found["mlm"] = self._masked_words(batch, seen, alphas["mlm"])
        if "mim" in active:
            found["mim"] = self._masked_patches(batch, alphas["mim"])
        if "psl" in active:
            found["psl"] = self._keywords(batch, seen, alphas["psl"])
        weight = {name: getattr(self.run.objectives, name).weight for name in found}
        return sum(weight[name] * loss for name, loss in found.items()), found

    def _soft(self, name: str) -> bool:
        """Whether the teacher gives this objective a soft target."""
        return self.teacher is not None and getattr(self.run.objectives, name).soft_alpha > 0

    def _towers(self, batch: Batch, active: set[str]) -> Seen:
        seen, contrast = Seen(), bool(active & {"itc", "itm"})
        if active - {"mim"}:
            seen.image = layers.image_pass(self.student.vision, batch.image, sdpa=self.sdpa)
        if contrast or "psl" in active:
            seen.image_vec = unit_rows(linear(self.student.vision_proj, seen.image[:, 0]))
        if contrast:
            seen.text = layers.language_pass(self.student.text, batch.token_ids, batch.token_mask, sdpa=self.sdpa)
            seen.vectors = seen.image_vec, unit_rows(linear(self.student.text_proj, seen.text[:, 0]))
            seen.keys = seen.vectors
        if self.teacher is not None:
            self._teacher_towers(batch, active, seen)
        return seen

    @torch.no_grad()
    def _teacher_towers(self, batch: Batch, active: set[str], seen: Seen) -> None:
        contrast = bool(active & {"itc", "itm"})
        recommends = "psl" in active and self._recommends()
        if contrast or recommends or ("mlm" in active and self._soft("mlm")):
            seen.teacher_image = layers.image_pass(self.teacher.vision, batch.image, sdpa=self.sdpa)
        if contrast or recommends:
            seen.image_key = unit_rows(linear(self.teacher.vision_proj, seen.teacher_image[:, 0]))
        if contrast:
            text = layers.language_pass(self.teacher.text, batch.token_ids, batch.token_mask, sdpa=self.sdpa)
            seen.keys = seen.image_key, unit_rows(linear(self.teacher.text_proj, text[:, 0]))

    def _contrast(self, batch: Batch, seen: Seen, alpha: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """ITC; similarities (B, B) of image to text and text to image."""
        queue, B = self.model.queue, len(batch)
        # float32 also under autocast, as in our step: the two are compared there too.
        with layers.without_autocast(batch.image.device):
            every = (
                losses.candidates(seen.keys[0], queue.image if queue is not None else None),
                losses.candidates(seen.keys[1], queue.text if queue is not None else None),
            )
            positive = self.run.objectives.itc.same_image is SameImage.positive
            target = losses.contrast_target(batch, seen.image_vec, queue, positive=positive)
            soft = alpha if self._soft("itc") else None
            loss, i2t, t2i = losses.contrast(seen.vectors, seen.keys, every, self.model.temperature, target, soft)
        return loss, (i2t[:, :B], t2i[:, :B])

    def _negatives(
        self,
        batch: Batch,
        seen: Seen,
        similarity: tuple[Tensor, Tensor] | None,
        eps: float,
        given: Negatives | None,
    ) -> tuple[list[int], list[int]]:
        """-> the image taken for each text, the text taken for each image"""
        if given is not None:
            return given.image.tolist(), given.text.tolist()
        if similarity is None:
            with torch.no_grad(), layers.without_autocast(batch.image.device):
                (image, text), (image_key, text_key), tau = seen.vectors, seen.keys, self.model.temperature
                similarity = image @ text_key.T / tau, text @ image_key.T / tau
        itm = self.run.objectives.itm
        forbidden = losses.forbidden_pairs(batch, itm)
        image = losses.draw_negatives(similarity[1], forbidden, itm, eps)
        return image, losses.draw_negatives(similarity[0], forbidden, itm, eps)

    def _matching(self, batch: Batch, seen: Seen, image: list[int], text: list[int], *, keep: bool) -> Tensor:
        """ITM: a pass over the B pairs (``keep`` its [CLS] attention), and one over the 2B mismatched ones."""
        ids, ok, stack = batch.token_ids, batch.token_mask, self.student.text
        if layers.first_fusion_layer(stack):  # ALBEF: text-only states go on, those of negative texts are copied
            start, negative = seen.text, losses.rows(seen.text, text)
        else:
            start, negative = layers.embed(stack, ids), None
        matched, attention = layers.text_over_image(stack, start, ok, seen.image, sdpa=self.sdpa, attention=keep)
        if keep:
            seen.keyword_attention = attention[:, :, 0].detach()
        both_ok = torch.cat([ok, losses.rows(ok, text)])
        if negative is None:
            both = layers.embed(stack, torch.cat([ids, losses.rows(ids, text)]))
        else:
            both = torch.cat([seen.text, negative])
        images = torch.cat([losses.rows(seen.image, image), seen.image])
        mismatched, _ = layers.text_over_image(stack, both, both_ok, images, sdpa=self.sdpa)
        return losses.matching(linear(self.model.itm_head, torch.cat([matched[:, 0], mismatched[:, 0]])))

    def _word_logits(self, text: nn.Module, batch: Batch, image: Tensor) -> Tensor:
        """Masked words over the image -> (B, L, V), at every position"""
        start = layers.fusion_input(text, batch.masked_ids, batch.token_mask, sdpa=self.sdpa)
        hidden, _ = layers.text_over_image(text, start, batch.token_mask, image, sdpa=self.sdpa)
        return layers.word_logits(text, hidden)

    def _masked_words(self, batch: Batch, seen: Seen, alpha: float) -> Tensor:
        teacher = None
        if self._soft("mlm"):
            with torch.no_grad():
                teacher = self._word_logits(self.teacher.text, batch, seen.teacher_image)
        logits = self._word_logits(self.student.text, batch, seen.image)
        axis = 1 if self.run.objectives.mlm.soft_dim is SoftDim.sequence else 2
        return losses.masked_words(logits, teacher, batch, alpha, axis)

    def _code_logits(self, towers: nn.Module, batch: Batch, memory: Tensor) -> Tensor:
        """Masked images over the text's embeddings memory (C, L, D) -> (C, P, K), at every patch"""
        C = len(batch.patch_mask)
        image = layers.image_pass(towers.vision, batch.image[:C], batch.patch_mask, sdpa=self.sdpa)
        hidden = layers.image_over_text(towers.text, image, memory, batch.token_mask[:C], sdpa=self.sdpa)
        return linear(towers.mim_head, hidden[:, 1:])

    def _masked_patches(self, batch: Batch, alpha: float) -> Tensor:
        ids = batch.token_ids[: len(batch.patch_mask)]
        memory = layers.embed(self.student.text, ids)
        logits, teacher = self._code_logits(self.student, batch, memory), None
        if self._soft("mim"):
            with torch.no_grad():
                source = self.run.objectives.mim.teacher_text
                if source is MimTeacherText.student_redraw:
                    memory = layers.embed(self.student.text, ids)
                elif source is MimTeacherText.teacher:
                    memory = layers.embed(self.teacher.text, ids)
                teacher = self._code_logits(self.teacher, batch, memory.detach())
        return losses.masked_patches(logits, teacher, self._codes(batch), batch, alpha)

    def _codes(self, batch: Batch) -> Tensor:
        """(C, P) visual codes"""
        if batch.codes is not None:
            return batch.codes
        return self.codes(batch.code_image if batch.code_image is not None else batch.image[: len(batch.patch_mask)])

    def _keywords(self, batch: Batch, seen: Seen, alpha: float) -> Tensor:
        psl, teacher = self.run.objectives.psl, None
        if psl.select is KeywordSelect.attention and seen.keyword_attention is None:
            seen.keyword_attention = self._keyword_pass(batch, seen)
        logits = linear(self.student.concept_head, seen.image_vec)
        if self._recommends():
            with torch.no_grad():
                teacher = linear(self.teacher.concept_head, seen.image_key)
        return losses.keywords(
            logits, seen.keyword_attention, teacher, batch, alpha, psl, self.cls_id, self.keyword_columns
        )

    def _recommends(self) -> bool:
        return self._soft("psl") and self.run.objectives.psl.recommend is not Recommend.off

    def _attends_in_matched(self) -> bool:
        """Whether the keyword attention is that of the student's matched pass."""
        psl = self.run.objectives.psl
        if psl is None or psl.select is not KeywordSelect.attention:
            return False
        return psl.attention is Side.student and psl.image_source is Side.student

    @torch.no_grad()
    def _keyword_pass(self, batch: Batch, seen: Seen) -> Tensor:
        """A whole pass, of which the last layer's [CLS] row of the self-attention is read: (B, H, L)"""
        psl = self.run.objectives.psl
        image = seen.image
        if psl.image_source is Side.teacher:
            image = seen.teacher_image
            if image is None:
                image = layers.image_pass(self.teacher.vision, batch.image, sdpa=self.sdpa)
        text = (self.teacher if psl.attention is Side.teacher else self.student).text
        ids, ok = batch.token_ids, batch.token_mask
        start = layers.fusion_input(text, ids, ok, sdpa=self.sdpa)
        return layers.text_over_image(text, start, ok, image, sdpa=self.sdpa, attention=True)[1][:, :, 0]

"""The forward of the `cross` family (SIMLA), read top to bottom.

From a static set of needs it computes each pass once, sends passes through the same weights in one call, and returns a
record. Objectives are functions over that record; an objective that is off leaves no pass behind.

Passes of a full SIMLA step, in units of B sequences (official ``SIMLA.forward`` makes the same ones, one call each):

    student  vision 2 (clean, masked)    text 1    text over image 4 (matched, 2 mismatched, MLM)    image over text 1
    (MIM) teacher  vision 2                    text 1    text over image 2 (MLM, keywords)                 image over
    text 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simla_ray.config.schema import Itm, MimTeacherText, Objectives, Side
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.negatives import negative_indices
from simla_ray.models.stack import Attentions, Memory
from simla_ray.types import Batch


@dataclass
class Record:
    """What the passes gave; a field is None where no active objective reads it. Shapes: see ``simla_ray.types``."""

    image_vec: Tensor | None = None  # (B, E) unit rows, student
    text_vec: Tensor | None = None
    image_key: Tensor | None = None  # (B, E) unit rows, teacher (or student, with gradient, where there is no teacher)
    text_key: Tensor | None = None
    negative_image: Tensor | None = None  # (B,) image taken as negative for text b
    negative_text: Tensor | None = None  # (B,) text taken as negative for image b
    match_logits: Tensor | None = None  # (3B, 2): matched, (text b, negative image), (negative text, image b)
    mlm_logits: Tensor | None = None  # (B, M, V) at mlm_index
    mlm_grid: Tensor | None = None  # (B, L, V)
    mlm_teacher: Tensor | None = None  # (B, M, V)
    mim_logits: Tensor | None = None  # (C, M, K) at mim_index
    mim_teacher: Tensor | None = None  # (C, M, K)
    cls_attention: Tensor | None = None  # (B, H, L)
    concept_logits: Tensor | None = None  # (B, V)
    concept_teacher: Tensor | None = None  # (B, V)


@dataclass(frozen=True)
class Negatives:
    """Negatives chosen from outside, in place of sampled ones."""

    image: Tensor  # (B,)
    text: Tensor  # (B,)


def forward_cross(
    model: Model,
    batch: Batch,
    objectives: Objectives,
    needs: Needs,
    *,
    itm_eps: float = 0.0,
    given: Negatives | None = None,
) -> Record:
    """All passes of one micro-batch.

    Args:
        itm_eps: what ``objectives.itm.eps`` has annealed to.
        given: fixed negatives; None draws them from torch's default generator.
    """
    student, record = model.student, Record()
    B = len(batch)

    # Student towers. Clean and masked images go through the ViT together: it has no dropout, rows do not see each
    # other.
    clean_images = needs.itc or needs.itm or needs.mlm or needs.psl
    image_tokens, masked_tokens = _vision(student.vision, batch, clean=clean_images, masked=needs.mim)
    if needs.text_only or needs.psl:
        record.image_vec = student.image_vector(image_tokens)
    if needs.text_only:
        record.text_vec = student.text_vector(student.text.encode(batch.token_ids, batch.token_mask))

    # Teacher towers.
    teacher_tokens = teacher_masked = None
    if model.teacher is None:
        record.image_key, record.text_key = record.image_vec, record.text_vec
    else:
        with torch.no_grad():
            towers = model.keys
            teacher_tokens, teacher_masked = _vision(
                towers.vision, batch, clean=needs.teacher_image, masked=needs.mim_teacher
            )
            if needs.text_only or needs.psl_recommend:
                record.image_key = towers.image_vector(teacher_tokens)
            if needs.text_only:
                record.text_key = towers.text_vector(towers.text.encode(batch.token_ids, batch.token_mask))

    # Negatives of ITM: student queries against keys of this micro-batch.
    if needs.itm:
        assert objectives.itm is not None
        if given is None:
            record.negative_image, record.negative_text = _draw_negatives(model, batch, record, objectives.itm, itm_eps)
        else:
            record.negative_image, record.negative_text = given.image, given.text

    # Text queries over the image: ITM's three groups and MLM in one call, keys and values of an image projected once.
    if needs.itm or needs.mlm:
        own = torch.arange(B, device=batch.token_ids.device)
        ids, masks, images = [], [], []
        if needs.itm:
            ids += [batch.token_ids, batch.token_ids, batch.token_ids[record.negative_text]]
            masks += [batch.token_mask, batch.token_mask, batch.token_mask[record.negative_text]]
            images += [own, record.negative_image, own]
        if needs.mlm:
            ids.append(batch.masked_ids)
            masks.append(batch.token_mask)
            images.append(own)
        own_attention = needs.itm and needs.psl_attention is Side.student and not needs.psl_teacher
        keep = Attentions(want_cls=own_attention)
        fused = student.text.encode(
            torch.cat(ids),
            torch.cat(masks),
            Memory(image_tokens, index=torch.cat(images)),
            keep,  # type: ignore[arg-type]
        )
        if keep.cls is not None:
            record.cls_attention = keep.cls[:B]
        if needs.itm:
            assert model.itm_head is not None
            record.match_logits = model.itm_head(fused[: 3 * B, 0])
        if needs.mlm:
            hidden = fused[-B:]
            if needs.mlm_grid:
                record.mlm_grid = student.text.word_logits(hidden)
                record.mlm_logits = _rows(record.mlm_grid, batch.mlm_index)
            else:
                record.mlm_logits = student.text.word_logits(_rows(hidden, batch.mlm_index))

    # Teacher: MLM over its own image tokens, keywords over the student's (official), in one call.
    _teacher_text_passes(model, batch, objectives, needs, record, image_tokens, teacher_tokens)

    # Image queries over the text: the embedding layer's output is the memory, not the language encoder's.
    if needs.mim:
        assert objectives.mim is not None and masked_tokens is not None
        C = len(masked_tokens)
        ids, mask = batch.token_ids[:C], batch.token_mask[:C]
        text = student.text.embeddings(ids)
        hidden = student.text.query_with_image(masked_tokens, Memory(text, mask))[:, 1:]
        record.mim_logits = student.mim_head(_rows(hidden, batch.mim_index))
        if needs.mim_teacher:
            assert teacher_masked is not None
            with torch.no_grad():
                source = objectives.mim.teacher_text
                if source is MimTeacherText.student_redraw:
                    text = student.text.embeddings(ids)
                elif source is MimTeacherText.teacher:
                    text = model.keys.text.embeddings(ids)
                text = text.detach().to(teacher_masked.dtype)
                hidden = model.keys.text.query_with_image(teacher_masked, Memory(text, mask))[:, 1:]
                record.mim_teacher = model.keys.mim_head(_rows(hidden, batch.mim_index))

    if needs.psl:
        record.concept_logits = student.concept_head(record.image_vec)
        if needs.psl_recommend:
            with torch.no_grad():
                record.concept_teacher = model.keys.concept_head(record.image_key)
    return record


def _vision(tower, batch: Batch, *, clean: bool, masked: bool) -> tuple[Tensor | None, Tensor | None]:
    """(B, N, D) tokens of the clean images and (C, N, D) of the masked ones, in one call."""
    B, C = len(batch), len(batch.patch_mask)
    if clean and masked:
        open_rows = torch.zeros(B, batch.patch_mask.shape[1], dtype=torch.bool, device=batch.image.device)
        tokens = tower(torch.cat([batch.image, batch.image[:C]]), torch.cat([open_rows, batch.patch_mask]))
        return tokens[:B], tokens[B:]
    if masked:
        return None, tower(batch.image[:C], batch.patch_mask)
    return (tower(batch.image) if clean else None), None


def _draw_negatives(model: Model, batch: Batch, record: Record, itm: Itm, eps: float) -> tuple[Tensor, Tensor]:
    assert record.image_vec is not None and record.text_vec is not None
    assert record.image_key is not None and record.text_key is not None
    # float32 also under autocast: at a temperature of 0.01 bfloat16 products would move the logits by 0.4.
    with torch.no_grad(), torch.autocast(batch.image.device.type, enabled=False):
        forbidden = torch.eye(len(batch), dtype=torch.bool, device=batch.image_id.device)
        if itm.exclude_same_image:
            forbidden = forbidden | (batch.image_id[:, None] == batch.image_id[None, :])
        text_to_image = record.text_vec @ record.image_key.T / model.temperature
        image_to_text = record.image_vec @ record.text_key.T / model.temperature
        return (
            negative_indices(text_to_image, forbidden, itm.negatives, eps),
            negative_indices(image_to_text, forbidden, itm.negatives, eps),
        )


def _teacher_text_passes(
    model: Model,
    batch: Batch,
    objectives: Objectives,
    needs: Needs,
    record: Record,
    image_tokens: Tensor | None,
    teacher_tokens: Tensor | None,
) -> None:
    """Fill ``mlm_teacher`` and ``cls_attention``."""
    keywords = needs.psl_attention is not None and record.cls_attention is None
    if not (needs.mlm_teacher or keywords):
        return
    B = len(batch)
    with torch.no_grad():
        ids, images = [], []
        if needs.mlm_teacher:
            ids.append(batch.masked_ids)
            images.append(teacher_tokens)
        if keywords:
            assert objectives.psl is not None
            source = (
                image_tokens
                if objectives.psl.image_source is Side.student
                else _teacher_clean(model, batch, teacher_tokens)
            )
            towers = model.keys if needs.psl_attention is Side.teacher else model.student
            if towers is not model.keys:  # without ITM there is no student pass to read the attention from
                keep = Attentions(want_cls=True)
                towers.text.encode(batch.token_ids, batch.token_mask, Memory(source), keep)  # type: ignore[arg-type]
                record.cls_attention = keep.cls
            else:
                ids.append(batch.token_ids)
                images.append(source)
        if not ids:
            return
        keep = Attentions(want_cls=len(ids) > int(needs.mlm_teacher))
        memory = torch.cat([t.to(images[0].dtype) for t in images])  # type: ignore[union-attr]
        hidden = model.keys.text.encode(torch.cat(ids), batch.token_mask.repeat(len(ids), 1), Memory(memory), keep)
        if keep.cls is not None:
            record.cls_attention = keep.cls[-B:]
        if needs.mlm_teacher:
            record.mlm_teacher = model.keys.text.word_logits(_rows(hidden[:B], batch.mlm_index))


def _teacher_clean(model: Model, batch: Batch, teacher_tokens: Tensor | None) -> Tensor:
    return teacher_tokens if teacher_tokens is not None else model.keys.vision(batch.image)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, D), index (B, M) -> (B, M, D)"""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))

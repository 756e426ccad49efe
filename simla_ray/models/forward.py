"""The forwards, one per fusion family, read top to bottom: `dual` (CLIP, SigLIP) and `cross` (SIMLA, ALBEF); `merged`
(ViLT) and `two_stage` (MVPTR) have rooms of their own.

From a static set of needs each computes each pass once, sends passes through the same weights in one call, and returns
a record. Objectives are functions over that record; an objective that is off leaves no pass behind.

Passes of a full SIMLA step, in units of B sequences (official ``SIMLA.forward`` makes the same ones, one call each):

    student  vision 2 (clean, masked)    text 1    text over image 4 (matched, 2 mismatched, MLM)    image over text 1
    (MIM) teacher  vision 2                    text 1    text over image 2 (MLM, keywords)                 image over
    text 1

ALBEF has no masked images and no keywords, and its text passes stop half-way where its fused ones begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simla_ray.config.schema import Itm, MimTeacherText, Objectives, Side
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.negatives import negative_indices
from simla_ray.models.stack import Attentions, Memory, Read
from simla_ray.models.text import TextModel, read_cls
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
    match_label: Tensor | None = None  # (B,) of match_logits (B, 2), where some images are swapped; else None
    word_states: Tensor | None = None  # (B, L - 1, D) of that pass, without [CLS]
    word_mask: Tensor | None = (
        None  # (B, L - 1) bool, which of word_states are there; with them [CLS], where WPA has it
    )
    patch_states: Tensor | None = None  # (B, P, D), or of regions (B, R, D)
    patch_mask: Tensor | None = None  # (B, R) bool; None: all of them are there
    region_logits: Tensor | None = None  # (B, M, d) features predicted of hidden regions
    region_features: Tensor | None = None  # (B, M, d) their own, without a gradient
    class_logits: Tensor | None = None  # (B, M, C)
    class_target: Tensor | None = None  # (B, M, C) soft
    mlm_logits: Tensor | None = None  # (B, M, V) at mlm_index
    mlm_grid: Tensor | None = None  # (B, L, V)
    mlm_teacher: Tensor | None = None  # (B, M, V)
    mim_logits: Tensor | None = None  # (C, M, K) at mim_index
    mim_teacher: Tensor | None = None  # (C, M, K)
    cls_attention: Tensor | None = None  # (B, H, L)
    concept_logits: Tensor | None = None  # (B, V)
    concept_teacher: Tensor | None = None  # (B, V)
    tag_logits: Tensor | None = None  # (B, M, V) at mcr_index
    phrase_states: Tensor | None = None  # (B, L, D) of ITM's matched pass, words and phrase concepts
    region_states: Tensor | None = None  # (B, R, D)
    other_image: Tensor | None = None  # (B,) image that a text's phrases are held against
    region_ranks: Tensor | None = None  # (2, B, L) in [0, 1), which of the most alike regions is taken; None: the first
    label_logits: Tensor | None = None  # (B, classes) of a statement, or of the known answers
    answer_logits: Tensor | None = None  # (B, A - 1, V): the pieces of an answer after its first


@dataclass(frozen=True)
class Negatives:
    """Negatives chosen from outside, in place of sampled ones."""

    image: Tensor  # (B,)
    text: Tensor  # (B,)


def forward_dual(model: Model, batch: Batch) -> Record:
    """Two towers that never see each other: the unit vectors of both, which are their own keys."""
    student = model.student
    image = student.image_vector(student.vision(batch.image))
    text = student.text_vector(_language(student.text, batch, cls=True).cls)
    return Record(image_vec=image, text_vec=text, image_key=image, text_key=text)


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
    starts = _language(
        student.text, batch, cls=needs.text_only, masked=needs.mlm,
        clean=needs.itm or needs.mim or needs.psl_attention is Side.student,
    )  # fmt: skip
    if needs.text_only:
        record.text_vec = student.text_vector(starts.cls)

    # Teacher towers.
    teacher_tokens = teacher_masked = None
    teacher_starts = Starts()
    if model.teacher is None:
        record.image_key, record.text_key = record.image_vec, record.text_vec
    else:
        with torch.no_grad():
            towers = model.keys
            teacher_tokens, teacher_masked = _vision(
                towers.vision, batch, clean=needs.teacher_image, masked=needs.mim_teacher
            )
            teacher_starts = _language(
                towers.text, batch, cls=needs.text_only, masked=needs.mlm_teacher,
                clean=needs.psl_attention is Side.teacher,
            )  # fmt: skip
            if needs.text_only or needs.psl_recommend:
                record.image_key = towers.image_vector(teacher_tokens)
            if needs.text_only:
                record.text_key = towers.text_vector(teacher_starts.cls)

    # Negatives of ITM: student queries against keys of this micro-batch.
    if needs.itm:
        assert objectives.itm is not None
        if given is None:
            record.negative_image, record.negative_text = _draw_negatives(model, batch, record, objectives.itm, itm_eps)
        else:
            record.negative_image, record.negative_text = given.image, given.text

    # Text queries over the image, in one call: MLM, ITM's matched pairs and negative texts, which read their own image,
    # and ITM's negative images.
    if needs.itm or needs.mlm:
        mask, parts, masks, reads, keep = batch.token_mask, [], [], [], Attentions()
        if needs.mlm:
            parts, masks = [starts.masked], [mask]
            every = torch.arange(mask.shape[1], device=mask.device).expand(B, -1)
            reads = [Read(slice(0, B), every if needs.mlm_grid else batch.mlm_index)]
        if needs.itm:
            negative, first = record.negative_text, len(parts) * B
            clean = starts.clean
            assert clean is not None and negative is not None
            parts += [clean, clean.index_select(0, negative), clean]
            masks += [mask, mask.index_select(0, negative), mask]
            reads.append(read_cls(torch.cat(masks), slice(first, first + 3 * B), record.negative_image))
            if needs.psl_attention is Side.student and not needs.psl_teacher:
                keep = Attentions(cls_rows=slice(first, first + B))
        memory = Memory(image_tokens, index=record.negative_image)  # type: ignore[arg-type]
        found = student.text.fuse(_enter(student.text, parts), torch.cat(masks), memory, reads, keep)
        record.cls_attention = keep.cls
        if needs.itm:
            assert model.itm_head is not None
            rows = found[-1][:, 0].unflatten(0, (3, B))  # matched, negative text, negative image
            record.match_logits = model.itm_head(torch.cat([rows[0], rows[2], rows[1]]))
        if needs.mlm:
            words = student.text.word_logits(found[0], starts.table)
            record.mlm_grid = words if needs.mlm_grid else None
            record.mlm_logits = _rows(words, batch.mlm_index) if needs.mlm_grid else words

    # Teacher: MLM over its own image tokens, keywords over the student's (official), in one call.
    _teacher_text_passes(
        model, batch, objectives, needs, record, image_tokens, teacher_tokens, starts, teacher_starts
    )  # fmt: skip

    # Image queries over the text: the embedding layer's output is the memory, not the language encoder's.
    if needs.mim:
        assert objectives.mim is not None and masked_tokens is not None
        C = len(masked_tokens)
        words, mask = starts.clean[:C], batch.token_mask[:C]  # type: ignore[index]
        text = student.text.embeddings.finish(words)
        patches = batch.mim_index + 1  # the class token comes first
        record.mim_logits = student.mim_head(student.text.query_with_image(masked_tokens, Memory(text, mask), patches))
        if needs.mim_teacher:
            assert teacher_masked is not None
            with torch.no_grad():
                source = objectives.mim.teacher_text
                if source is MimTeacherText.student_redraw:
                    text = student.text.embeddings.finish(words)
                elif source is MimTeacherText.teacher:
                    text = model.keys.text.embeddings(batch.token_ids[:C])
                text = text.detach().to(teacher_masked.dtype)
                hidden = model.keys.text.query_with_image(teacher_masked, Memory(text, mask), patches)
                record.mim_teacher = model.keys.mim_head(hidden)

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


@dataclass
class Starts:
    """What text passes start from: the language encoder's [CLS] (B, 1, D), and the starts of fused passes (B, L, D).

    With fusion in every layer a start is the words' vectors, to which each pass adds positions and its own dropout;
    with fusion in the upper half it is the language encoder's states. ``table``: see ``Embeddings.look_up``.
    """

    cls: Tensor | None = None
    clean: Tensor | None = None
    masked: Tensor | None = None
    table: Tensor | None = None


def _language(text: TextModel, batch: Batch, *, cls: bool, clean: bool = False, masked: bool = False) -> Starts:
    """Text alone, of clean and masked captions. One look-up for all: each has a gradient of the vocabulary's size.

    ``cls``: [CLS] of the clean caption.
    """
    mask, starts = batch.token_mask, Starts()
    ids = ([batch.token_ids] if cls or clean else []) + ([batch.masked_ids] if masked else [])
    if not ids:
        return starts
    words, starts.table = text.embeddings.look_up(torch.cat(ids))
    parts = words.split(len(mask))
    if text.split and (clean or masked):  # the lower half reads clean and masked captions in one call
        states = text.embeddings.finish(torch.cat(parts))
        parts = text.encoder(states, mask.repeat(len(ids), 1), layers=text.language_layers).split(len(mask))
        starts.cls = parts[0][:, :1] if cls else None
    elif cls:
        states = text.embeddings.finish(parts[0])
        (starts.cls,) = text.encoder(states, mask, reads=[read_cls(mask)], layers=text.language_layers)
    starts.clean = parts[0] if clean else None
    starts.masked = parts[-1] if masked else None
    return starts


def _enter(text: TextModel, parts: list[Tensor | None]) -> Tensor:
    """The starts of fused passes in one tensor (n, L, D), as the first fusion layer takes them."""
    start = torch.cat(parts)  # type: ignore[arg-type]
    return start if text.split else text.embeddings.finish(start)


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
    starts: Starts,
    teacher_starts: Starts,
) -> None:
    """Fill ``mlm_teacher`` and ``cls_attention``."""
    keywords = needs.psl_attention is not None and record.cls_attention is None
    if not (needs.mlm_teacher or keywords):
        return
    B, mask = len(batch), batch.token_mask
    with torch.no_grad():
        parts, images, reads, keep = [], [], [], Attentions()
        if needs.mlm_teacher:
            parts, images, reads = (
                [teacher_starts.masked],
                [teacher_tokens],
                [Read(slice(0, B), batch.mlm_index, slice(0, B))],
            )
        if keywords:
            assert objectives.psl is not None
            source = image_tokens
            if objectives.psl.image_source is Side.teacher:
                source = teacher_tokens if teacher_tokens is not None else model.keys.vision(batch.image)
            if needs.psl_attention is Side.student:  # without ITM there is no student pass to read the attention from
                keep.cls_rows = slice(0, B)
                student = model.student.text
                student.fuse(_enter(student, [starts.clean]), mask, Memory(source), [], keep)  # type: ignore[arg-type]
                record.cls_attention, keep = keep.cls, Attentions()
            else:
                keep.cls_rows = slice(len(parts) * B, (len(parts) + 1) * B)
                parts.append(teacher_starts.clean)
                images.append(source)
        if not parts:
            return
        text = model.keys.text
        memory = torch.cat([t.to(images[0].dtype) for t in images])  # type: ignore[union-attr]
        found = text.fuse(_enter(text, parts), mask.repeat(len(parts), 1), Memory(memory), reads, keep)
        if keep.cls is not None:
            record.cls_attention = keep.cls
        if needs.mlm_teacher:
            record.mlm_teacher = text.word_logits(found[0])


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, D), index (B, M) -> (B, M, D)"""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))

"""The loss of a micro-batch: which objective reads what of the forward's record."""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ray.config.enums import ContrastLoss, SameImage
from simla_ray.config.schema import Distilled, Itc, Itm, Objectives
from simla_ray.models.forward import Record
from simla_ray.models.queue import Queue
from simla_ray.models.temperature import Scale
from simla_ray.objectives.answers import answer_loss, label_loss
from simla_ray.objectives.contrastive import itc_loss, sigmoid_loss
from simla_ray.objectives.keywords import keyword_targets, psl_loss, select_keywords
from simla_ray.objectives.masked_image import mim_loss
from simla_ray.objectives.masked_regions import mrc_loss, mrckl_loss, mrfr_loss
from simla_ray.objectives.masked_tags import mcr_loss
from simla_ray.objectives.masked_text import mlm_loss
from simla_ray.objectives.matching import itm_loss
from simla_ray.objectives.phrase_grounding import wpg_loss
from simla_ray.objectives.word_patch import wpa_loss
from simla_ray.types import Batch, LossTerm


def alpha_at(objective: Distilled, progress: float) -> float:
    """Share of the soft target: 0 -> soft_alpha, linearly over the first ``alpha_ramp`` of the run (progress 0..1)."""
    if objective.alpha_ramp == 0:
        return objective.soft_alpha
    return objective.soft_alpha * min(1.0, progress / objective.alpha_ramp)


def itm_eps_at(itm: Itm | None, progress: float) -> float:
    """ITM's sampling eps: constant, or moving geometrically to ``eps_end`` over the run."""
    if itm is None:
        return 0.0
    if itm.eps_end is None or itm.eps == 0:
        return itm.eps
    return itm.eps * (itm.eps_end / itm.eps) ** progress


def contrast(
    itc: Itc,
    image: Tensor,
    text: Tensor,
    image_key: Tensor,
    text_key: Tensor,
    scale: Scale,
    alpha: float = 0.0,
    queue: Queue | None = None,
    image_id: Tensor | None = None,
    key_id: Tensor | None = None,
    first: int = 0,
) -> LossTerm:
    """ITC as configured; arguments as ``itc_loss`` has them. ``key_id`` (G,) without the queue's."""
    if itc.loss is ContrastLoss.sigmoid:
        assert scale.bias is not None
        return sigmoid_loss(image, text_key, scale(), scale.bias, image_id, key_id, first)
    old_images, old_texts = (queue.image, queue.text) if queue is not None else (None, None)
    if key_id is not None and queue is not None:
        key_id = torch.cat([key_id, queue.ids])
    return itc_loss(
        image, text, image_key, text_key, scale(), alpha, old_images, old_texts, image_id, key_id, first
    )  # fmt: skip


def loss_terms(
    record: Record,
    batch: Batch,
    objectives: Objectives,
    active: set[str],
    alphas: dict[str, float],
    *,
    scale: Scale | None,
    queue: Queue | None,
    codes: Tensor | None,
    cls_id: int,
    keyword_columns: Tensor | None = None,
) -> dict[str, LossTerm]:
    """One ``LossTerm`` per active objective, unweighted.

    Args:
        alphas: share of the soft target per objective, see ``alpha_at``.
        codes: (C, P) visual codes, with MIM.
        keyword_columns: (V',) ids that PSL is restricted to.
    """
    terms: dict[str, LossTerm] = {}
    if "itc" in active:
        assert objectives.itc is not None and scale is not None
        vectors = record.image_vec, record.text_vec, record.image_key, record.text_key
        ids = batch.image_id if objectives.itc.same_image is SameImage.positive else None
        terms["itc"] = contrast(objectives.itc, *vectors, scale, alphas["itc"], queue, ids, ids)  # type: ignore[arg-type]
    if "itm" in active:
        assert record.match_logits is not None
        terms["itm"] = itm_loss(record.match_logits, record.match_label)
    if "mlm" in active:
        assert record.mlm_logits is not None
        terms["mlm"] = mlm_loss(
            record.mlm_logits,
            batch.mlm_label,
            batch.mlm_weight,
            record.mlm_teacher,
            alphas["mlm"],
            record.mlm_grid,
            batch.mlm_index,
        )
    if "mim" in active:
        assert record.mim_logits is not None and codes is not None
        terms["mim"] = mim_loss(
            record.mim_logits, codes, batch.mim_index, batch.mim_weight, record.mim_teacher, alphas["mim"]
        )
    if "psl" in active:
        psl, logits = objectives.psl, record.concept_logits
        assert psl is not None and logits is not None
        chosen = select_keywords(record.cls_attention, batch.keyword_ok, batch.word_start, batch.keyword_prior, psl)
        words = batch.token_ids if batch.is_concept is None else batch.token_ids.masked_fill(batch.is_concept, cls_id)
        target = keyword_targets(words, chosen, logits.shape[1], cls_id, logits.dtype)
        terms["psl"] = psl_loss(logits, target, record.concept_teacher, alphas["psl"], psl, keyword_columns)
    if "wpa" in active:
        wpa = objectives.wpa
        assert wpa is not None and record.word_states is not None and record.patch_states is not None
        assert record.match_label is not None and record.word_mask is not None
        terms["wpa"] = wpa_loss(
            record.word_states,
            record.word_mask,
            record.patch_states,
            record.match_label,
            wpa.beta,
            wpa.iterations,
            record.patch_mask,
        )
    if "mcr" in active:
        assert record.tag_logits is not None and batch.tag_ids is not None
        assert batch.mcr_index is not None and batch.mcr_weight is not None
        terms["mcr"] = mcr_loss(record.tag_logits, batch.tag_ids, batch.mcr_index, batch.mcr_weight)
    if "wpg" in active:
        wpg = objectives.wpg
        assert wpg is not None and record.phrase_states is not None and record.region_states is not None
        assert batch.is_concept is not None and batch.region_mask is not None and record.other_image is not None
        terms["wpg"] = wpg_loss(
            record.phrase_states,
            batch.is_concept,
            record.region_states,
            batch.region_mask,
            record.other_image,
            record.region_ranks,
            wpg.top_k,
            wpg.margin,
        )
    if "mrfr" in active:
        assert record.region_logits is not None and record.region_features is not None
        assert batch.mrm_weight is not None
        terms["mrfr"] = mrfr_loss(record.region_logits, record.region_features, batch.mrm_weight)
    if {"mrc", "mrckl"} & active:
        classes, truth = record.class_logits, record.class_target
        assert classes is not None and truth is not None and batch.mrm_weight is not None
        if "mrc" in active:
            terms["mrc"] = mrc_loss(classes, truth, batch.mrm_weight)
        if "mrckl" in active:
            assert objectives.mrckl is not None
            terms["mrckl"] = mrckl_loss(classes, truth, batch.mrm_weight, objectives.mrckl.reduction)
    if "answers" in active:
        if record.answer_logits is not None:
            assert batch.answer_ids is not None
            terms["answers"] = answer_loss(record.answer_logits, batch.answer_ids)
        else:
            assert record.label_logits is not None and batch.label is not None
            terms["answers"] = label_loss(record.label_logits, batch.label)
    if "labels" in active:
        assert record.label_logits is not None and batch.label is not None
        terms["labels"] = label_loss(record.label_logits, batch.label)
    return terms

"""The forward of the fourth fusion family, `two_stage` (MVPTR): two towers, then one stack over what both give.

Passes of a full step, in units of B sequences (official ``BiBertImgForPreTraining.forward``):

    words and concepts 1    tags and regions 1    words and concepts over regions 2 (matched, mismatched)

All objectives read the same masked inputs, so there is no clean pass; mismatched pairs are made of the towers' states,
which are not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simla_ray.config.enums import Negatives, Pick
from simla_ray.config.schema import Itm, Objectives
from simla_ray.models.forward import Record
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.negatives import negative_indices
from simla_ray.models.stack import Read
from simla_ray.models.two_stage import StageMerging, TaggedRegionTower
from simla_ray.types import Batch


@dataclass(frozen=True)
class Draws:
    """What a step draws.

    ``order`` (B,): pairs that lose their image, in the first half, and their text, in the second; ``other`` (B,): the
    image that each text's phrases are held against; ``ranks`` (2, B, L) in [0, 1): see ``wpg_loss``.
    """

    order: Tensor
    other: Tensor
    ranks: Tensor


def forward_two_stage(
    model: Model,
    batch: Batch,
    objectives: Objectives,
    needs: Needs,
    *,
    itm_eps: float = 0.0,
    given: Draws | None = None,
) -> Record:
    """All passes of one micro-batch.

    Args:
        itm_eps: what ``objectives.itm.eps`` has annealed to.
        given: fixed draws; None takes them from torch's default generator.
    """
    student, record = model.student, Record()
    text, tower, merging = student.text, student.vision, student.merging
    assert isinstance(tower, TaggedRegionTower) and isinstance(merging, StageMerging)
    assert batch.tag_ids is not None and batch.masked_tag_ids is not None
    assert batch.region_boxes is not None and batch.region_mask is not None
    B, mask, there = len(batch), batch.token_mask, batch.region_mask
    G = batch.tag_ids.shape[1]
    draws = given if given is not None else draw(batch, objectives)

    # One look-up for both sides and both decoders: each has a gradient of the vocabulary's size.
    ids = [batch.masked_ids, batch.masked_tag_ids]
    vectors, table = text.embeddings.look_up(torch.cat([part.flatten() for part in ids]))
    parts = zip(vectors.split([part.numel() for part in ids]), ids, strict=True)
    words, tags = (found.unflatten(0, part.shape) for found, part in parts)
    words = text.encoder(text.embeddings.finish(words), mask)
    features = tower.look(batch.image, batch.regions, batch.region_boxes)
    # The mask is not that of the masked ids: a random id may be that of [PAD].
    image = tower.states(tags, batch.tag_ids != 0, features, batch.region_boxes, there)
    regions = image[:, G:]
    if needs.psl:
        record.image_vec = student.image_vector(image)
        record.concept_logits = student.concept_head(record.image_vec)
    if needs.text_only:
        record.text_vec = record.text_key = student.text_vector(words)
        record.image_vec = record.image_key = student.image_vector(image)
    if needs.mcr:
        record.tag_logits = tower.tag_logits(_rows(image, batch.mcr_index), table)
    if not needs.fusion:
        return record

    states, masks = [torch.cat([words, regions], 1)], [torch.cat([mask, there], 1)]
    places = torch.arange(mask.shape[1] + there.shape[1], device=mask.device).expand(B, -1)
    reads = [Read(slice(0, B), places)]
    if needs.itm:
        assert objectives.itm is not None
        of_text, of_image = mismatched(model, batch, record, objectives.itm, itm_eps, draws.order)
        states.append(torch.cat([words.index_select(0, of_text), regions.index_select(0, of_image)], 1))
        masks.append(torch.cat([mask.index_select(0, of_text), there.index_select(0, of_image)], 1))
        reads.append(Read(slice(B, 2 * B), places[:, :1]))
        record.negative_text, record.negative_image = of_text, of_image
    matched, *rest = merging.encoder(torch.cat(states), torch.cat(masks), reads=reads)
    if needs.itm:
        record.match_logits = model.match(torch.cat([matched[:, 0], rest[0][:, 0]]))
        record.match_label = (torch.arange(2 * B, device=mask.device) < B).long()
    if needs.mlm:
        record.mlm_logits = text.word_logits(_rows(matched, batch.mlm_index), table)
    if needs.wpg:
        assert objectives.wpg is not None
        record.phrase_states, record.region_states = matched[:, : mask.shape[1]], matched[:, mask.shape[1] :]
        record.other_image = draws.other
        record.region_ranks = draws.ranks if objectives.wpg.pick is Pick.random else None
    return record


def draw(batch: Batch, objectives: Objectives) -> Draws:
    """The step's draws, from torch's default generator."""
    B, device = len(batch), batch.token_ids.device
    other = negative_indices(
        torch.zeros(B, B, device=device), _same(batch, objectives.itm), Negatives.random, 0.0
    )  # fmt: skip
    return Draws(torch.randperm(B, device=device), other, torch.rand(2, *batch.token_ids.shape, device=device))


def mismatched(
    model: Model, batch: Batch, record: Record, itm: Itm, eps: float, order: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) texts and (B,) images of B mismatched pairs: the first half of ``order`` keep their text, with a negative
    image; the others keep their image, with a negative text.
    """
    assert record.image_vec is not None and record.text_vec is not None
    with torch.no_grad(), torch.autocast(order.device.type, enabled=False):
        similar = record.text_vec @ record.image_vec.T / model.temperature
        forbidden = _same(batch, itm)
        image = negative_indices(similar, forbidden, itm.negatives, eps)
        text = negative_indices(similar.T, forbidden, itm.negatives, eps)
    own_text, own_image = order[: len(order) // 2], order[len(order) // 2 :]
    return torch.cat([own_text, text[own_image]]), torch.cat([image[own_text], own_image])


def _same(batch: Batch, itm: Itm | None) -> Tensor:
    """(B, B) bool: what is no negative of each other."""
    if itm is None or itm.exclude_same_image:
        return batch.image_id[:, None] == batch.image_id[None, :]
    return torch.eye(len(batch), dtype=torch.bool, device=batch.image_id.device)


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    """states (B, S, D) at index (B, M) -> (B, M, D)"""
    assert index is not None
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[-1]))

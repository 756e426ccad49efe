"""The forward of `merged` fusion over regions (UNITER): every pass is one over words and regions.

Passes of a step with all of UNITER's objectives on, in units of B sequences; the published schedule draws one of them
for each step (official ``model/pretrain.py``, ``UniterForPretraining.forward``):

    words over regions 3 (masked words; clean words, half of them with another image; hidden regions)

WPA reads ITM's pass; MRFR, MRC and MRC-kl, where several are on at once, share the one over hidden regions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.config.schema import Objectives
from simla_ray.models.forward import Record
from simla_ray.models.forward_merged import half_swapped
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.region_merging import RegionMerging, are_there
from simla_ray.models.region_tower import RegionTower
from simla_ray.models.stack import Read
from simla_ray.types import Batch


def forward_regions(
    model: Model, batch: Batch, objectives: Objectives, needs: Needs, swapped: tuple[Tensor, Tensor] | None = None
) -> Record:
    """All passes of one micro-batch.

    Args:
        swapped: labels and images of ITM's pass as ``half_swapped`` gives them; None draws them.
    """
    student, record = model.student, Record()
    tower, merging, stack = student.vision, student.merging, student.text.encoder
    assert isinstance(tower, RegionTower) and isinstance(merging, RegionMerging)
    assert batch.region_boxes is not None and batch.region_mask is not None
    B, L = batch.token_ids.shape
    features = tower.look(batch.image, batch.regions, batch.region_boxes)
    clean = None
    if needs.mlm or needs.itm or needs.wpa:
        clean = tower.embed(features, batch.region_boxes, batch.region_mask)

    ids, pictures, reads = [], [], []
    if needs.mlm:
        assert clean is not None
        ids, pictures, reads = [batch.masked_ids], [clean], [Read(slice(0, B), batch.mlm_index)]
    if needs.itm or needs.wpa:
        assert clean is not None
        if swapped is None:
            exclude = objectives.itm is None or objectives.itm.exclude_same_image
            swapped = half_swapped(batch.image_id, exclude)
        record.match_label, record.negative_image = swapped
        shown = clean.index_select(0, record.negative_image)
        wanted = L + shown.shape[1] if needs.wpa else 1
        at = torch.arange(wanted, device=shown.device).expand(B, -1)
        reads.append(Read(slice(len(ids) * B, (len(ids) + 1) * B), at))
        ids, pictures = [*ids, batch.token_ids], [*pictures, shown]
    if needs.hides_regions:
        assert batch.region_hidden is not None and batch.mrm_index is not None
        reads.append(Read(slice(len(ids) * B, (len(ids) + 1) * B), L + batch.mrm_index))
        hidden = tower.embed(features, batch.region_boxes, batch.region_mask, batch.region_hidden)
        ids, pictures = [*ids, batch.token_ids], [*pictures, hidden]

    vectors, table = student.text.embeddings.look_up(torch.cat(ids))
    words = student.text.embeddings.finish(vectors)
    found = merging.read(stack, words, batch.token_mask.repeat(len(ids), 1), torch.cat(pictures), reads)

    if needs.mlm:
        record.mlm_logits = student.text.word_logits(found.pop(0), table)
    if needs.itm or needs.wpa:
        states = found.pop(0)
        if needs.itm:
            record.match_logits = model.match(states[:, 0])
        if needs.wpa:
            assert objectives.wpa is not None
            first = int(objectives.wpa.exclude_special)
            record.word_states, record.word_mask = states[:, first:L], batch.token_mask[:, first:]
            record.patch_states, record.patch_mask = states[:, L:], are_there(shown)
    if needs.hides_regions:
        _recover(model, batch, needs, record, found.pop(0), features)
    return record


def _recover(model: Model, batch: Batch, needs: Needs, record: Record, states: Tensor, features: Tensor) -> None:
    """What the states (B, M, D) of hidden regions say of their features and classes, and what is true of them."""
    student, index = model.student, batch.mrm_index
    assert index is not None
    there = features.gather(1, index[:, :, None].expand(-1, -1, features.shape[-1])).detach()
    if needs.mrfr:
        record.region_logits = student.region_regression(states, student.vision.img_linear.weight)
        record.region_features = there
    if needs.mrc or needs.mrckl:
        record.class_logits = student.region_classifier(states)
        record.class_target = _classes(model, batch, there, index)


def _classes(model: Model, batch: Batch, features: Tensor, index: Tensor) -> Tensor:
    """(B, M, C) classes of the hidden regions: the annotated ones, else softly those of the nearest codes."""
    if batch.region_class is not None:
        classes = model.student.region_classifier[-1].out_features
        return F.one_hot(batch.region_class.gather(1, index), classes).to(features.dtype)
    assert model.region_codes is not None
    return model.region_codes(features)

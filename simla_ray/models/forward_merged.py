"""The forward of the third fusion family, `merged` (ViLT): no towers, every pass is one over words and patches.

Passes of a full ViLT step, in units of B sequences (official ``objectives.py``: ``compute_mlm``, ``compute_itm_wpa``):

    words over patches 2 (masked words with their picture; clean words, half of them with another one)

Patches are embedded once for both, and both go through the stack in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ray.config.enums import Negatives
from simla_ray.config.schema import Objectives
from simla_ray.models.forward import Record
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.negatives import negative_indices
from simla_ray.types import Batch


def forward_merged(model: Model, batch: Batch, objectives: Objectives, needs: Needs) -> Record:
    """All passes of one micro-batch."""
    student, record = model.student, Record()
    B, merging = len(batch), student.merging
    assert merging is not None
    patches = student.vision(batch.image)

    ids, pictures = [], []
    if needs.mlm:
        ids, pictures = [batch.masked_ids], [patches]
    if needs.itm or needs.wpa:
        exclude = objectives.itm is None or objectives.itm.exclude_same_image
        record.match_label, record.negative_image = half_swapped(batch.image_id, exclude)
        ids.append(batch.token_ids)
        pictures.append(patches.index_select(0, record.negative_image))

    vectors, table = student.text.embeddings.look_up(torch.cat(ids))
    words = student.text.embeddings.finish(vectors)
    mask = batch.token_mask.repeat(len(ids), 1)
    words, patches = merging(student.layers, words, mask, torch.cat(pictures))

    if needs.mlm:
        at = batch.mlm_index[:, :, None].expand(-1, -1, words.shape[-1])
        record.mlm_logits = student.text.word_logits(words[:B].gather(1, at), table)
    if needs.itm:
        assert model.itm_head is not None
        record.match_logits = model.itm_head(merging.pool(words[-B:, 0]))
    if needs.wpa:
        record.word_states, record.patch_states = words[-B:, 1:], patches[-B:, 1:]
        record.word_mask = batch.token_mask[:, 1:]
    return record


def half_swapped(image_id: Tensor, exclude_same_image: bool) -> tuple[Tensor, Tensor]:
    """Which texts keep their image, and what image each text of a micro-batch is shown: ViLT's matching.

    Exactly half of them, rounded down, keep theirs; which, and what the others get, is drawn from torch's default
    generator. Official ViLT draws the others' images from the whole data set; ours come from the micro-batch, as every
    method's negatives do.

    Args:
        image_id: (B,); with ``exclude_same_image`` no text gets another row of its own image, unless all rows are.

    Returns:
        label (B,) int64, 1 where the image is the text's own; (B,) int64 row of the image.
    """
    B, device = len(image_id), image_id.device
    label = (torch.randperm(B, device=device) < B // 2).long()
    forbidden = torch.eye(B, dtype=torch.bool, device=device)
    if exclude_same_image:
        forbidden = image_id[:, None] == image_id[None, :]
    other = negative_indices(torch.zeros(B, B, device=device), forbidden, Negatives.random, 0.0)
    return label, torch.where(label == 1, torch.arange(B, device=device), other)

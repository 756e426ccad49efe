"""Masked concept recovering, MCR: an image's tags from its regions."""

from __future__ import annotations

from torch import Tensor

from simla_ray.objectives.distillation import distilled_cross_entropy
from simla_ray.types import LossTerm


def mcr_loss(logits: Tensor, tag_ids: Tensor, index: Tensor, weight: Tensor) -> LossTerm:
    """-log p[tag], mean over the chosen tokens of tags; 0 where none is.

    Source: MVPTR, ``BiBertImgForPreTraining`` (``half_mlm``): the image side alone, phrase concepts are not recovered.

    Args:
        logits: (B, M, V) at ``index`` (B, M), positions in tag_ids (B, G); weight (B, M), 0 marks padding.
    """
    return distilled_cross_entropy(logits, tag_ids.gather(1, index), weight, None, 0.0)

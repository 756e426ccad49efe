"""Masked image modelling over the text, MIM: XMM's image side."""

from __future__ import annotations

from torch import Tensor

from simla_ray.objectives.distillation import distilled_cross_entropy
from simla_ray.types import LossTerm


def mim_loss(
    logits: Tensor,
    codes: Tensor,
    index: Tensor,
    weight: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
) -> LossTerm:
    """(1 - alpha) CE to the visual codes + alpha soft CE, mean over all masked patches of the micro-batch.

    Args:
        logits, teacher_logits: (C, M, K) at the masked patches.
        codes: (C, P) visual codes of all patches, row-major.
        index, weight: (C, M) masked patches; images mask different numbers of them, weight 0 marks padding.
    """
    return distilled_cross_entropy(logits, codes.gather(1, index), weight, teacher_logits, alpha)

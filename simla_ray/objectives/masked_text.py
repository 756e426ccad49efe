"""Masked language modelling over the image, MLM: XMM's text side."""

from __future__ import annotations

from torch import Tensor

from simla_ray.objectives.distillation import distilled_cross_entropy
from simla_ray.types import LossTerm


def mlm_loss(
    logits: Tensor,
    label: Tensor,
    weight: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
    grid: Tensor | None = None,
    index: Tensor | None = None,
) -> LossTerm:
    """(1 - alpha) CE + alpha soft CE, mean over the chosen tokens.

    Args:
        logits, teacher_logits: (B, M, V) at the chosen positions.
        label, weight: (B, M); weight 0 marks padding.
        grid, index: (B, L, V) logits of all positions and (B, M) the chosen ones. Given, the soft part takes its
            log-softmax over the L positions, padding included: the slip of the official ``med.BertForMaskedLM.forward``
            (dim=1), kept for ``mlm.soft_dim: sequence``.
    """
    soft_log_p = None
    if grid is not None and index is not None:
        soft_log_p = grid.log_softmax(1).gather(1, index[:, :, None].expand(-1, -1, grid.shape[-1]))
    return distilled_cross_entropy(logits, label, weight, teacher_logits, alpha, soft_log_p)

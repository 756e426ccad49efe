"""Cross-entropy against a mix of the true class and the teacher's distribution; what MLM and MIM share."""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ray.types import LossTerm


def distilled_cross_entropy(
    logits: Tensor,
    label: Tensor,
    weight: Tensor,
    teacher_logits: Tensor | None,
    alpha: float,
    soft_log_p: Tensor | None = None,
) -> LossTerm:
    """mean over rows with weight 1 of  (1 - alpha) * -log p[label]  +  alpha * -sum_c q[c] log p[c]

    Args:
        logits: (..., classes); softmax of them is p.
        label, weight: (...); a row with weight 0 is padding. No row at all gives 0, not NaN.
        teacher_logits: (..., classes) without gradient; softmax of them is q. None: hard targets only.
        soft_log_p: log p of the soft part where it is not log softmax(logits), see ``mlm_loss``.
    """
    log_p = _float(logits).log_softmax(-1)
    count = weight.sum().clamp(min=1)
    hard = (-log_p.gather(-1, label[..., None])[..., 0] * weight).sum() / count
    accuracy = ((logits.argmax(-1) == label) * weight).sum() / count
    loss, metrics = hard, {"hard": hard.detach(), "accuracy": accuracy, "targets": weight.sum()}
    if teacher_logits is not None and alpha > 0:
        q = _float(teacher_logits).softmax(-1)
        soft_log_p = log_p if soft_log_p is None else _float(soft_log_p)
        soft = (-(q * soft_log_p).sum(-1) * weight).sum() / count
        loss = (1 - alpha) * hard + alpha * soft
        metrics["soft"] = soft.detach()
    return LossTerm(loss, metrics)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

"""Masked region modelling: features and classes of hidden regions (UNITER, arXiv 1909.11740, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ray.config.enums import Reduction
from simla_ray.types import LossTerm


def mrfr_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> LossTerm:
    """Masked region feature regression: mean of (prediction - target)^2 over the hidden regions and their d numbers.

    Args:
        prediction, target: (B, M, d); the target carries no gradient. weight: (B, M), 0 marks padding.
    """
    each = (_wide(prediction) - _wide(target.detach())).square().mean(-1)
    return _term(each, weight, {})


def mrc_loss(logits: Tensor, target: Tensor, weight: Tensor) -> LossTerm:
    """Masked region classification: cross-entropy to the likeliest class that is not background, mean over regions
    that are not surely background.

    Args:
        logits: (B, M, C); target: (B, M, C) soft classes, of which 0 is background. weight: (B, M).
    """
    label = target[..., 1:].argmax(-1) + 1
    weight = weight * (target[..., 1:].sum(-1) > 0)
    each = -_wide(logits).log_softmax(-1).gather(-1, label[..., None])[..., 0]
    return _term(each, weight, {"accuracy": _mean((logits.argmax(-1) == label).to(each.dtype), weight)})


def mrckl_loss(logits: Tensor, target: Tensor, weight: Tensor, reduction: Reduction) -> LossTerm:
    """KL(target || softmax(logits)) of the hidden regions.

    ``element``, as in the official code, takes the mean over regions and classes, 1/C of the mean over ``region``.

    Args:
        as of ``mrc_loss``; a class that the target gives nothing adds nothing.
    """
    target = _wide(target.detach())
    each = (torch.xlogy(target, target) - target * _wide(logits).log_softmax(-1)).sum(-1)
    if reduction is Reduction.element:
        each = each / logits.shape[-1]
    hit = (logits.argmax(-1) == target.argmax(-1)).to(each.dtype)
    return _term(each, weight, {"accuracy": _mean(hit, weight)})


def _term(each: Tensor, weight: Tensor, metrics: dict[str, Tensor]) -> LossTerm:
    loss = _mean(each, weight)
    return LossTerm(loss, {"hard": loss.detach(), **metrics})


def _mean(each: Tensor, weight: Tensor) -> Tensor:
    return (each * weight).sum() / weight.sum().clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

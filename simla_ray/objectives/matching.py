"""Image-text matching, ITM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.types import LossTerm


def itm_loss(logits: Tensor, label: Tensor | None = None) -> LossTerm:
    """Cross-entropy of "does this text describe this image": mean over the rows, label 1 = match.

    Args:
        logits: (3B, 2): B matched pairs, then B texts with a negative image, then B negative texts with their image
            (official ``SIMLA.forward``); or with ``label`` one row a text (ViLT).
        label: (n,) int64 of the rows; None for the order above.
    """
    if label is None:
        n = len(logits) // 3
        label = (torch.arange(3 * n, device=logits.device) < n).long()
    loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), label)
    accuracy = (logits.argmax(1) == label).float().mean()
    return LossTerm(loss, {"hard": loss.detach(), "accuracy": accuracy})

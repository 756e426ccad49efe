"""What fine-tuning learns: answers to questions, and labels of statements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.types import LossTerm


def answer_loss(logits: Tensor, answer_ids: Tensor, pad_id: int = 0) -> LossTerm:
    """Negative log-likelihood of an answer, summed over its pieces and its end: mean over B rows.

    The official code (``models/simla/vqa.py``) sums over all annotated answers, each times its share of the
    annotators; one answer drawn with that share has the same mean.

    Args:
        logits: (B, A - 1, V): at each place the next piece.
        answer_ids: (B, A): [CLS], pieces, [SEP], padding.
    """
    target = answer_ids[:, 1:]
    there = target != pad_id
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = F.cross_entropy(wide.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    loss = (each * there).sum() / len(logits)
    whole = ((logits.argmax(-1) == target) | ~there).all(1)
    return LossTerm(loss, {"hard": loss.detach(), "accuracy": whole.float().mean()})


def label_loss(logits: Tensor, label: Tensor) -> LossTerm:
    """Cross-entropy of (B, classes) against label (B,), mean over the rows that have one; -100 stands for none."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    n = (label >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(wide, label, reduction="sum") / n
    return LossTerm(loss, {"hard": loss.detach(), "accuracy": (logits.argmax(1) == label).sum() / n})

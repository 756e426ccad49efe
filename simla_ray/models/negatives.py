"""Negatives of image-text matching."""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ray.config.schema import Negatives


def negative_indices(similarity: Tensor, forbidden: Tensor, how: Negatives, eps: float) -> Tensor:
    """One negative per row.

    Args:
        similarity: (B, B), rows are queries, already divided by the temperature.
        forbidden: (B, B) bool: own pair, and where asked for other captions of the same image.
        how: sample from softmax(similarity) + eps (official, eps 0), take the most similar, or uniformly at random.
        eps: added after the softmax, so that a row can never underflow to zeros (the official retrieval code adds it to
            the logits, where it does nothing).

    Returns:
        (B,) int64. A row whose every entry is forbidden (all captions of one image) takes any other row.
    """
    B = len(similarity)
    own = torch.eye(B, dtype=torch.bool, device=similarity.device)
    forbidden = forbidden & ~forbidden.all(1, keepdim=True) | own
    if how is Negatives.hard:
        return similarity.masked_fill(forbidden, float("-inf")).argmax(1)
    weights = torch.ones_like(similarity) if how is Negatives.random else similarity.softmax(1) + eps
    weights = weights.masked_fill(forbidden, 0)
    # Underflow or non-finite features would make multinomial fail on the host; such a row draws uniformly instead.
    usable = (weights.sum(1, keepdim=True) > 0) & weights.isfinite().all(1, keepdim=True)
    weights = torch.where(usable, weights, (~forbidden).to(weights.dtype))
    return torch.multinomial(weights, 1)[:, 0]

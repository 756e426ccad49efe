"""Weakly supervised phrase grounding, WPG: a text's phrases fit regions of its own image better than another's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.types import LossTerm

#: Below every cosine: what a region that is not there scores.
NOWHERE = -1e4


def wpg_loss(
    states: Tensor,
    is_phrase: Tensor,
    regions: Tensor,
    region_mask: Tensor,
    other: Tensor,
    draws: Tensor | None,
    top_k: int,
    margin: float,
) -> LossTerm:
    """A hinge between an image's own score and that of another:

        s(p, I) = one of the ``top_k`` largest cosines of phrase p to the regions of I, S(b, I) = mean over p of s(p, I)
        loss = mean over texts b with a phrase of  max(0, margin + S(b, image of other[b]) - S(b, own image))

    0 where no text has a phrase. Source: MVPTR, ``modeling_vlbert.py``, ``phrase_mod='sample'``; theirs is NaN
    there, and fails where an image has fewer than 3 regions.

    Args:
        states: (B, L, D) of the texts; is_phrase: (B, L) bool. regions: (B, R, D); region_mask: (B, R) bool, each row
            with one region at least.
        other: (B,) int64, whose regions each text is held against.
        draws: (2, B, L) in [0, 1): which of the largest is taken, in the own image and in the other; None takes the
            largest.

    ``metrics["accuracy"]``: share of the texts with a phrase whose own image scores higher.
    """
    with torch.autocast(states.device.type, enabled=False):
        phrases, places = _unit(states), _unit(regions)
        scores = []
        for i, index in enumerate((None, other)):
            there = region_mask if index is None else region_mask.index_select(0, index)
            seen = places if index is None else places.index_select(0, index)
            cosine = (phrases @ seen.transpose(1, 2)).masked_fill(~there[:, None, :], NOWHERE)
            best = cosine.topk(min(top_k, cosine.shape[2]), dim=2).values
            rank = torch.zeros(is_phrase.shape, dtype=torch.int64, device=best.device)
            if draws is not None:
                rank = (draws[i] * there.sum(1, keepdim=True).clamp(1, best.shape[2])).long()
            chosen = best.gather(2, rank[:, :, None])[:, :, 0].masked_fill(~is_phrase, 0)
            scores.append(chosen.sum(1) / is_phrase.sum(1).clamp(min=1))
        own, others = scores
        counted = is_phrase.any(1)
        n = counted.sum().clamp(min=1)
        loss = (margin + others - own).clamp(min=0).masked_fill(~counted, 0).sum() / n
    accuracy = ((own > others) & counted).sum() / n
    return LossTerm(loss, {"hard": loss.detach(), "accuracy": accuracy.detach()})


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

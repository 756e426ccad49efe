"""Pseudo-supervised keyword learning, PSL: a caption's keywords become labels of the image.

Each head of the multimodal encoder's last self-attention votes for the positions its [CLS] query looks at most; the
most voted words are the hard labels, and the teacher recommends further words that the image shows. The gradient
reaches the concept head, the image projection and the image tower, never the text (official ``SIMLA.forward``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.config.schema import KeywordSelect, KeywordUnit, Psl, Recommend
from simla_ray.types import LossTerm


def select_keywords(attention: Tensor | None, ok: Tensor, word_start: Tensor, prior: Tensor, psl: Psl) -> Tensor:
    """Positions that become keywords.

    Args:
        attention: (B, H, L) self-attention probabilities of [CLS]; None with a control (``psl.select``), which takes
        the
            highest ``prior`` instead.
        ok: (B, L) bool, positions that may become keywords.
        word_start: (B, L) position of the first piece of each piece's word.
        prior: (B, L).

    Returns:
        (B, L) bool. With ``psl.unit: word`` all pieces of a chosen word. At most ``max_keywords`` positions (words) per
        row, ranked by votes, then mean attention, then position. Where the official code lets ``topk`` break ties,
        order decides.
    """
    L = ok.shape[1]
    position = torch.arange(L, device=ok.device)
    if psl.unit is KeywordUnit.word:
        candidate = ok & (word_start == position)
    else:
        candidate = ok
    if psl.select is not KeywordSelect.attention:
        score = prior.masked_fill(~candidate, float("-inf"))
        chosen = _first(score.argsort(dim=1, descending=True, stable=True), psl.max_keywords) & candidate
    else:
        assert attention is not None
        chosen = _vote(attention, candidate, word_start, psl)
    if psl.unit is KeywordUnit.word:
        chosen = chosen.gather(1, word_start) & ok
    return chosen


def _vote(attention: Tensor, candidate: Tensor, word_start: Tensor, psl: Psl) -> Tensor:
    B, H, L = attention.shape
    if psl.unit is KeywordUnit.word:  # a word gets the attention of all its pieces
        start = word_start[:, None, :].expand(-1, H, -1)
        attention = torch.zeros_like(attention).scatter_add_(2, start, attention)
    score = attention.masked_fill(~candidate[:, None, :], -1.0)
    top, where = score.topk(min(psl.heads_top_k, L), dim=2)
    counts = ((top >= 0) & (top >= psl.min_attention)).to(torch.int64)
    votes = torch.zeros(B, H, L, dtype=torch.int64, device=attention.device).scatter_add_(2, where, counts).sum(1)
    # Rank by votes, then mean attention, then position: stable sorts, last key first.
    order = attention.mean(1).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, votes.gather(1, order).argsort(dim=1, descending=True, stable=True))
    chosen = _first(order, psl.max_keywords)
    return chosen & (candidate if psl.zero_vote_fill else votes > 0)


def _first(order: Tensor, k: int) -> Tensor:
    """(B, L) order of positions -> (B, L) bool, True at the first k of it."""
    chosen = torch.zeros_like(order, dtype=torch.bool)
    return chosen.scatter_(1, order[:, :k], True)


def keyword_targets(ids: Tensor, chosen: Tensor, vocab_size: int, cls_id: int, dtype: torch.dtype) -> Tensor:
    """ids, chosen (B, L) -> (B, V) multi-hot. Repeated words count once; [CLS] is never a keyword."""
    target = torch.zeros(len(ids), vocab_size, dtype=dtype, device=ids.device)
    target.scatter_reduce_(1, ids, chosen.to(dtype), "amax")
    target[:, cls_id] = 0
    return target


def recommendations(teacher_logits: Tensor, psl: Psl) -> Tensor:
    """(B, V) logits of the teacher -> (B, V) targets in 0..1.

    soft: its probabilities, where at least ``recommend_threshold`` and among the ``recommend_top_k`` largest, else 0
    (threshold 0 and no top-k is the official behaviour). hard: 1 there, else 0.
    """
    probability = teacher_logits.sigmoid()
    keep = probability >= psl.recommend_threshold
    if psl.recommend_top_k is not None:
        top = probability.topk(min(psl.recommend_top_k, probability.shape[1]), 1).indices
        keep &= torch.zeros_like(keep).scatter_(1, top, True)
    if psl.recommend is Recommend.hard:
        return keep.to(probability.dtype)
    return torch.where(keep, probability, torch.zeros_like(probability))


def psl_loss(
    logits: Tensor,
    hard_target: Tensor,
    teacher_logits: Tensor | None,
    alpha: float,
    psl: Psl,
    columns: Tensor | None = None,
) -> LossTerm:
    """(1 - alpha) BCE(u, y) + alpha BCE(u, r), mean over B * V.

    BCE is linear in its target, so this is one BCE against (1 - alpha) y + alpha r. Rows without any keyword get weight
    0 and are counted in ``metrics["empty"]`` (the official code cannot have them: it fills up with zero-vote
    positions).

    Args:
        logits: (B, V) u, from the student's image vector.
        hard_target: (B, V) y.
        teacher_logits: (B, V) or None where nothing is recommended.
        columns: (V',) the vocabulary the loss is restricted to; the mean is then over B * V'.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    target = hard_target.to(logits.dtype)
    if teacher_logits is not None and alpha > 0:
        target = (1 - alpha) * target + alpha * recommendations(teacher_logits.to(logits.dtype), psl)
    if columns is not None:
        logits, target, hard_target = logits[:, columns], target[:, columns], hard_target[:, columns]
    row = (hard_target.sum(1) > 0).to(logits.dtype)
    cells = row.sum().clamp(min=1) * logits.shape[1]
    loss = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * row[:, None]).sum() / cells
    with torch.no_grad():
        hard = F.binary_cross_entropy_with_logits(logits, hard_target.to(logits.dtype), reduction="none")
        hard = (hard * row[:, None]).sum() / cells
    keywords = hard_target.sum(1).float().mean()
    return LossTerm(loss, {"hard": hard, "keywords": keywords, "empty": (1 - row).sum()})

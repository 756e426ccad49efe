"""The losses written out: targets and distributions are made whole, then multiplied and summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.config.schema import Itm, Negatives, Psl
from simla_ray.models.queue import Queue
from simla_ray.objectives.keywords import keyword_targets, recommendations, select_keywords
from simla_ray.types import Batch
from tests.reference.layers import full


def pick(x: Tensor, chosen: Tensor) -> Tensor:
    """x (B, S, ...), chosen (B, S) bool -> (n, ...)"""
    return x[chosen]


def mix(hard: Tensor, soft: Tensor | None, alpha: float) -> Tensor:
    return hard if soft is None else (1 - alpha) * hard + alpha * soft


def positions(index: Tensor, weight: Tensor, length: int) -> Tensor:
    """Padded index (B, M) and weight (B, M) -> (B, length) bool"""
    chosen = torch.zeros(len(index), length, device=index.device, dtype=weight.dtype)
    return chosen.scatter_add_(1, index, weight) > 0


# --- ITC --------------------------------------------------------------------------------------------------------------


def candidates(key: Tensor, queued: Tensor | None) -> Tensor:
    """key (B, E), queued (Q, E) -> (B + Q, E): the queue is copied, and copied again into one matrix with the keys."""
    return key if queued is None else torch.cat([key, queued.clone().detach()])


def contrast(
    student: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    every: tuple[Tensor, Tensor],
    temperature: Tensor,
    target: Tensor,
    alpha: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ITC and the student's similarities.

    Args:
        student, keys: (B, E) image and text vectors.
        every: (B + Q, E) image and text candidates.
        target: (B, B + Q) rows that sum to one.
        alpha: share of the soft target, None without one.

    Returns:
        loss, image to text (B, B + Q), text to image (B, B + Q)
    """
    losses, found = [], []
    for own, key, candidate in ((student[0], keys[0], every[1]), (student[1], keys[1], every[0])):
        similarity = own @ candidate.T / temperature
        mixed = target
        if alpha is not None:
            with torch.no_grad():
                mixed = alpha * (key @ candidate.T / temperature).softmax(1) + (1 - alpha) * target
        losses.append(-(similarity.log_softmax(1) * mixed).sum(1).mean())
        found.append(similarity)
    return (losses[0] + losses[1]) / 2, found[0], found[1]


def contrast_target(batch: Batch, like: Tensor, queue: Queue | None, *, positive: bool) -> Tensor:
    """(B, B + Q): one-hot at the own pair, or uniform over all candidates of the same image."""
    B, Q = len(batch), len(queue.ids) if queue is not None else 0
    target = torch.zeros(B, B + Q, dtype=like.dtype, device=like.device)
    if not positive:
        return target.fill_diagonal_(1)
    ids = batch.image_id if queue is None else torch.cat([batch.image_id, queue.ids])
    target[batch.image_id[:, None] == ids[None, :]] = 1
    return target / target.sum(1, keepdim=True)


# --- ITM --------------------------------------------------------------------------------------------------------------


def forbidden_pairs(batch: Batch, itm: Itm) -> Tensor:
    """(B, B) bool: the own pair, and the same image unless that leaves a row without any negative."""
    own = torch.eye(len(batch), dtype=torch.bool, device=batch.image_id.device)
    if not itm.exclude_same_image:
        return own
    same = batch.image_id[:, None] == batch.image_id[None, :]
    return torch.where(same.all(1, keepdim=True), own, same)


@torch.no_grad()
def draw_negatives(similarity: Tensor, forbidden: Tensor, itm: Itm, eps: float) -> list[int]:
    """similarity (B, B) over the temperature -> one negative per row, drawn row by row and read by the host.

    A row without any weight left raises in ``multinomial``, as in the official code; our step draws uniformly there.
    """
    if itm.negatives is Negatives.hard:
        return [row.argmax().item() for row in similarity.masked_fill(forbidden, float("-inf"))]
    weights = torch.ones_like(similarity) if itm.negatives is Negatives.random else similarity.softmax(1) + eps
    weights = weights.masked_fill(forbidden, 0)
    return [torch.multinomial(weights[b], 1).item() for b in range(len(weights))]


def rows(x: Tensor, index: list[int]) -> Tensor:
    """x (B, ...) -> (len(index), ...), one row after the other"""
    return torch.stack([x[i] for i in index])


def matching(logits: Tensor) -> Tensor:
    """(3B, 2) -> scalar; the first third matches."""
    B = len(logits) // 3
    label = torch.cat([torch.ones(B, dtype=torch.long), torch.zeros(2 * B, dtype=torch.long)]).to(logits.device)
    return F.cross_entropy(full(logits), label)


# --- MLM and MIM ------------------------------------------------------------------------------------------------------


def masked_words(logits: Tensor, teacher: Tensor | None, batch: Batch, alpha: float, soft_axis: int) -> Tensor:
    """logits, teacher (B, L, V) -> scalar; the soft part normalises over ``soft_axis``: 2 (V), or 1 (the slip)."""
    chosen = positions(batch.mlm_index, batch.mlm_weight, logits.shape[1])
    count = chosen.sum().clamp(min=1)
    labels = batch.token_ids.masked_fill(~chosen, -100)
    logits = full(logits)
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
    if teacher is None:
        return hard
    soft = -(F.log_softmax(logits, soft_axis) * full(teacher).softmax(-1)).sum(-1)
    return mix(hard, pick(soft, chosen).sum() / count, alpha)


def masked_patches(logits: Tensor, teacher: Tensor | None, codes: Tensor, batch: Batch, alpha: float) -> Tensor:
    """logits, teacher (C, P, K), codes (C, P) -> scalar"""
    chosen = batch.patch_mask
    count = chosen.sum().clamp(min=1)
    logits = full(pick(logits, chosen))
    hard = F.cross_entropy(logits, pick(codes, chosen), reduction="sum") / count
    if teacher is None:
        return hard
    soft = -(F.log_softmax(logits, -1) * full(pick(teacher, chosen)).softmax(-1)).sum()
    return mix(hard, soft / count, alpha)


# --- PSL --------------------------------------------------------------------------------------------------------------


def keywords(
    logits: Tensor,
    attention: Tensor | None,
    teacher: Tensor | None,
    batch: Batch,
    alpha: float,
    psl: Psl,
    cls_id: int,
    columns: Tensor | None,
) -> Tensor:
    """logits, teacher (B, V), attention (B, H, L) of [CLS] -> scalar: two BCEs over the rows that have a keyword."""
    logits = full(logits)
    chosen = select_keywords(attention, batch.keyword_ok, batch.word_start, batch.keyword_prior, psl)
    hard_target = keyword_targets(batch.token_ids, chosen, logits.shape[1], cls_id, logits.dtype)
    soft_target = recommendations(teacher.to(logits.dtype), psl) if teacher is not None else None
    if columns is not None:
        logits, hard_target = logits[:, columns], hard_target[:, columns]
        soft_target = soft_target[:, columns] if soft_target is not None else None
    used = (hard_target.sum(1) > 0).to(logits.dtype)
    cells = used.sum().clamp(min=1) * logits.shape[1]

    def bce(target: Tensor) -> Tensor:
        cell = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (cell * used[:, None]).sum() / cells

    return mix(bce(hard_target), bce(soft_target) if soft_target is not None else None, alpha)

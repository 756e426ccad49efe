"""Dropout with masks that are cheap on a CPU.

There, torch's own costs more than the addition and LayerNorm that follow. Here one comparison of 16 random bits an
element (p is rounded to 1/65536) writes the mask in the type of what it multiplies, which spares a conversion in both
directions, and the scale goes into the operation that follows. On a GPU torch's own fused kernel runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """As torch's dropout."""
        if not self.training or self.p == 0:
            return x
        return masked(x, self.p) * _scale(self.p) if cheap_on(x) else F.dropout(x, self.p)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + dropout(x)"""
        if not self.training or self.p == 0:
            return residual + x
        if cheap_on(x):
            return _MaskedAdd.apply(x, residual, self.p)
        return residual + F.dropout(x, self.p)


def attend_with_dropout(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, p: float) -> Tensor:
    """dropout(softmax(query @ key^T / sqrt(d))) @ value, for a device that ``cheap_on`` names: torch has no fused
    attention with dropout there.

    query (B, H, L, d), key and value (B, H, S, d), allowed (B, 1, 1, S) bool or None -> (B, H, L, d)
    """
    return _DropoutAttention.apply(query, key, value, allowed, p)


def attention_probabilities(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    """query (B, H, L, d), key (B, H, S, d) -> (B, H, L, S)"""
    scores = _products(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), query.shape[-1] ** -0.5)
    return _softmax(scores.unflatten(0, query.shape[:2]), allowed)


def _softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    return (scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))).softmax(-1)


def _products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b, (N, L, d) and (N, d, S) -> (N, L, S), without a pass of its own for the scale."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def cheap_on(x: Tensor) -> bool:
    """Whether masks are drawn here: on a CPU, and not inside compiled code, which fuses its own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def masked(x: Tensor, p: float) -> Tensor:
    """x where a draw keeps it, else 0; not yet scaled by 1 / (1 - p)."""
    return _Masked.apply(x, p)


def _scale(p: float) -> float:
    return 1 / (1 - p)


class _DropoutAttention(torch.autograd.Function):
    """Written out for its backward pass, where torch would spend a pass over the gradients on every scale.

    Of the softmax, the gradient of the scores is dropped * d_dropped - probabilities * sum(gradient * out), as in
    FlashAttention: the mask itself is not needed again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, p: float) -> Tensor:
        ctx.heads, ctx.p = query.shape[:2], p
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        scores = _products(query, key.transpose(1, 2), query.shape[-1] ** -0.5)
        probabilities = _softmax(scores.unflatten(0, ctx.heads), allowed).flatten(0, 1)
        probabilities = probabilities.to(query.dtype)  # autocast widens them
        dropped = _draw(probabilities, p).mul_(probabilities)
        out = _products(dropped, value, _scale(p))
        ctx.save_for_backward(query, key, value, probabilities, dropped, out)
        return out.unflatten(0, ctx.heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, probabilities, dropped, out = ctx.saved_tensors
        gradient, scale = gradient.flatten(0, 1), query.shape[-1] ** -0.5
        d_value = _products(dropped.transpose(1, 2), gradient, _scale(ctx.p))
        d_scores = _products(gradient, value.transpose(1, 2), _scale(ctx.p)).mul_(dropped)
        d_scores.addcmul_(probabilities, (gradient * out).sum(-1, keepdim=True), value=-1)
        d_query = _products(d_scores, key, scale)
        d_key = _products(d_scores.transpose(1, 2), query, scale)
        return *(d.unflatten(0, ctx.heads) for d in (d_query, d_key, d_value)), None, None  # type: ignore[return-value]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = _draw(x, p)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


class _MaskedAdd(torch.autograd.Function):
    """residual + mask * x / (1 - p)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, p: float) -> Tensor:
        mask = _draw(x, p)
        ctx.save_for_backward(mask)
        ctx.scale = _scale(p)
        return torch.addcmul(residual, x, mask, value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale).to(mask.dtype), gradient, None


def _draw(x: Tensor, p: float) -> Tensor:
    """1 where a draw keeps it, else 0, shaped and typed as x."""
    bits = torch.empty(math.prod(x.shape) // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    sixteen = bits.view(torch.int16)[: x.numel()].view(x.shape)
    # The comparison writes numbers itself: to multiply by truth values, torch would convert them first, every time.
    return torch.ge(sixteen, round(p * 2**16) - 2**15, out=torch.empty(x.shape, dtype=x.dtype))

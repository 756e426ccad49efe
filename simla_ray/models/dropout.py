"""Dropout with masks that are cheap on a CPU.

There, drawing a float mask costs more than the addition and LayerNorm that follow. Here a mask is one bool an element,
drawn 15 bits at a time (p is rounded to 1/32768), and its scale goes into the operation that follows. On a GPU torch's
own fused kernel runs.
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
            return torch.add(residual, masked(x, self.p), alpha=_scale(self.p))
        return residual + F.dropout(x, self.p)


def attend_with_dropout(probabilities: Tensor, value: Tensor, p: float) -> Tensor:
    """dropout(probabilities (..., L, S)) @ value (..., S, d), for a device that ``cheap_on`` names."""
    return scaled_products(masked(probabilities, p), value, _scale(p))


def scaled_products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b, (B, H, L, d) and (B, H, d, S) -> (B, H, L, S), without a pass of its own for the scale."""
    a_flat, b_flat = a.flatten(0, 1), b.flatten(0, 1)
    return torch.baddbmm(a_flat.new_zeros(()), a_flat, b_flat, beta=0, alpha=scale).unflatten(0, a.shape[:2])


def cheap_on(x: Tensor) -> bool:
    """Whether masks are drawn here: on a CPU, and not inside compiled code, which fuses its own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def masked(x: Tensor, p: float) -> Tensor:
    """x where a draw keeps it, else 0; not yet scaled by 1 / (1 - p)."""
    return _Masked.apply(x, p)


def _scale(p: float) -> float:
    return 1 / (1 - p)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        n = math.prod(x.shape)
        # 31 random bits for each of these integers: two halves of which 15 bits are surely random.
        halves = torch.empty((n + 1) // 2, dtype=torch.int32).random_().view(torch.int16)[:n]
        keep = (halves.bitwise_and_(0x7FFF) >= round(p * 0x8000)).view(x.shape)
        ctx.save_for_backward(keep)
        return x * keep

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return gradient * keep, None

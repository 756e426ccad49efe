"""What the workers of a run say to each other outside the gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Comm:
    """Rank, world size and the collectives; a single process needs no process group."""

    def __init__(self) -> None:
        self.grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.grouped else 0
        self.world = dist.get_world_size() if self.grouped else 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def cat(self, value: Tensor) -> Tensor:
        """(n, ...) of every rank -> (world * n, ...) in rank order, on every rank. n is the same everywhere."""
        if self.world == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def gather(self, value: Any) -> list[Any]:
        """Picklable objects of our own processes, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value)
        return parts

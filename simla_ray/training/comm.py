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

    def share(self, n: int, rank: int | None = None) -> int:
        """How many of n micro-batches a rank has: rank, rank + world, ... of them."""
        return len(range(self.rank if rank is None else rank, n, self.world))

    def cat(self, value: Tensor, n: int) -> list[Tensor]:
        """(k, ...) of every rank, k a multiple of its share of n -> those of every rank, on every rank."""
        if self.world == 1:
            return [value]
        each = len(value) // self.share(n)
        sizes = [each * self.share(n, rank) for rank in range(self.world)]
        padded = value.new_zeros((max(sizes), *value.shape[1:]))
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def in_turns(self, value: Tensor, n: int) -> Tensor:
        """(share, ...), one for each micro-batch of this rank -> (n, ...) in the order of the step, on every rank."""
        parts = self.cat(value, n)
        return torch.stack([parts[i % self.world][i // self.world] for i in range(n)])

    def gather(self, value: Any) -> list[Any]:
        """Picklable objects of our own processes, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value)
        return parts

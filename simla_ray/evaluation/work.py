"""Work that several ranks share, so that a result does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: Object of this rank -> the objects of all ranks, in rank order; every rank calls it equally often.
Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Work:
    """Rank r of ``world`` computes chunks r, r + world, ...; every rank gets every chunk's result.

    What is in a chunk never depends on ``world``. The same numbers go through the same batches on one rank and on ten,
    and the results are equal to the last bit on equal hardware.
    """

    rank: int = 0
    world: int = 1
    gather: Gather = lambda own: [own]

    def map(self, function: Callable[[T], R], chunks: Sequence[T]) -> list[R]:
        """``[function(chunk) for chunk in chunks]``. Collective; results must be picklable and on the host."""
        return interleave(self.gather([function(chunk) for chunk in chunks[self.rank :: self.world]]))


class once(Generic[R]):  # noqa: N801  (used as a decorator, like property)
    """A property that is computed when first read.

    ``functools.cached_property`` of Python 3.11 holds a lock meanwhile that all instances share: where ranks are
    threads of one process, a collective inside it would wait forever.
    """

    def __init__(self, function: Callable[[Any], R]):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> R:
        value = instance.__dict__[self.function.__name__] = self.function(instance)
        return value


def interleave(shards: Sequence[Sequence[T]]) -> list[T]:
    """Lists of the ranks, rank r holding items r, r + world, ... -> all items in order.

    Raises:
        ValueError: the lengths are not those of one list dealt out in turn.
    """
    n, world = sum(map(len, shards)), len(shards)
    expected = [len(range(rank, n, world)) for rank in range(world)]
    if [len(shard) for shard in shards] != expected:
        found = [len(shard) for shard in shards]
        raise ValueError(f"ranks hold {found} rows, expected {expected}: rank r takes rows r, r + {world}, ...")
    return [shards[i % world][i // world] for i in range(n)]


def chunks_of(n: int, size: int) -> list[range]:
    """0..n-1 in consecutive ranges of ``size``."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]

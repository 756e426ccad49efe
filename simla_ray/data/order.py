"""The order in which rows are trained on: a function of (seed, epoch, ordinal), of nothing else.

A step is made of ``lanes`` micro-batches. Each epoch is dealt to the lanes in equal slices (they differ by at most one
row), and lane m gives micro-batch m of every step. A worker reads whole lanes, so rows are read once however many
workers there are, and which rows form a micro-batch does not depend on the number of workers. Lanes go on into the next
epoch without a gap: the rows left over at the end of an epoch open the next epoch's first micro-batch.

The epoch's sequence is the units (row groups) in random order; it is shuffled within windows of ``window`` rows. A data
set that fits into one window is shuffled as a whole, before it is dealt.

A mixture plans round(weight * rows) samples of each source an epoch: its rows as often as they go in whole, and of the
rest a stretch that moves on with every epoch, so that all rows have their turn. A row that is planned again in the same
epoch has the ordinal of its first time plus the number of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Position:
    """Place in a lane: rows of epoch ``epoch`` before ``offset`` have been passed."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Window:
    """Rows [start, stop) of a lane's slice of an epoch: what one reading task takes."""

    lane: int
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Share:
    """How often an epoch passes the units ``first`` to ``last`` (excluded)."""

    first: int
    last: int
    weight: float


@dataclass(frozen=True)
class Order:
    """Order over a data set whose units have ``unit_rows`` rows; without ``shares`` an epoch passes each row once."""

    unit_rows: tuple[int, ...]
    lanes: int
    window: int
    seed: int
    shares: tuple[Share, ...] = ()

    @property
    def rows(self) -> int:
        """Samples of an epoch."""
        return sum(self.planned(share) for share in self.shares) if self.shares else sum(self.unit_rows)

    def planned(self, share: Share) -> int:
        """Samples that an epoch takes from a source."""
        return round(share.weight * sum(self.unit_rows[share.first : share.last]))

    def lane_rows(self, lane: int) -> int:
        """Rows of an epoch in a lane."""
        return self.rows * (lane + 1) // self.lanes - self.rows * lane // self.lanes

    def steps(self, epochs: float, micro: int) -> int:
        """Steps until every lane has passed ``epochs`` epochs, the last ones rounded up to full micro-batches."""
        longest = max(self.lane_rows(lane) for lane in range(self.lanes))
        return -(-int(np.ceil(longest * epochs)) // micro)

    def windows(self, lane: int, at: Position) -> Iterator[Window]:
        """The lane's windows from ``at`` on, epoch after epoch, without end."""
        epoch, rows = at.epoch, self.lane_rows(lane)
        offset = at.offset
        while True:
            while offset < rows:
                stop = min((offset // self.window + 1) * self.window, rows)
                yield Window(lane, epoch, offset, stop)
                offset = stop
            epoch, offset = epoch + 1, 0

    def ordinals(self, window: Window) -> np.ndarray:
        """(stop - start,) int64 ordinals of a window, in order."""
        first, pieces = self.rows * window.lane // self.lanes, self._pieces(window.epoch)
        if self.rows <= self.window:
            sequence = self._rng(window.epoch, 0).permutation(_joined(pieces, 0, self.rows))
            return sequence[first + window.start : first + window.stop]
        begin = window.start // self.window * self.window
        end = min(begin + self.window, self.lane_rows(window.lane))
        pieces = pieces[self._rng(window.epoch, 0).permutation(len(pieces))]
        rows = _joined(pieces, first + begin, first + end)
        rows = self._rng(window.epoch, 1, window.lane, begin).permutation(rows)
        return rows[window.start - begin : window.stop - begin]

    def _pieces(self, epoch: int) -> np.ndarray:
        """(n, 2) first ordinal and number of rows of what an epoch is made of: units, and parts of units."""
        sizes = np.asarray(self.unit_rows)
        units, every = np.stack([np.cumsum(sizes) - sizes, sizes], 1), int(sizes.sum())
        if not self.shares:
            return units
        pieces = [np.empty((0, 2), dtype=np.int64)]
        for number, share in enumerate(self.shares):
            own = units[share.first : share.last]
            n = int(own[:, 1].sum())
            times, rest = divmod(self.planned(share), n)
            pieces += [own + np.array([time * every, 0]) for time in range(times)]
            # The units in an order that stays: the stretch of an epoch begins where that of the last one ended.
            turn = own[self._rng(0, 2, number).permutation(len(own))]
            start = epoch * rest % n
            for low, high in ((start, min(start + rest, n)), (0, start + rest - n)):
                pieces.append(_cut(turn, low, high) + np.array([times * every, 0]))
        return np.concatenate(pieces)

    def _rng(self, epoch: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *purpose])


def _cut(pieces: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The rows [start, stop) of a sequence of pieces (n, 2), as pieces."""
    ends = np.cumsum(pieces[:, 1])
    begins = ends - pieces[:, 1]
    low, high = np.maximum(begins, start), np.minimum(ends, stop)
    found = np.stack([pieces[:, 0] + low - begins, high - low], 1)
    return found[high > low]


def _joined(pieces: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The ordinals of the rows [start, stop) of a sequence of pieces."""
    return np.concatenate([np.arange(first, first + n) for first, n in _cut(pieces, start, stop)])

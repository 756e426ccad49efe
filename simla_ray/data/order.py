"""The order in which rows are trained on: a function of (seed, epoch, ordinal), of nothing else.

A step is made of ``lanes`` micro-batches. Each epoch is dealt to the lanes in equal slices (they differ by at most one
row), and lane m gives micro-batch m of every step. A worker reads whole lanes, so rows are read once however many
workers there are, and which rows form a micro-batch does not depend on the number of workers. Lanes go on into the next
epoch without a gap: the rows left over at the end of an epoch open the next epoch's first micro-batch.

The epoch's sequence is the units (row groups) in random order; it is shuffled within windows of ``window`` rows. A data
set that fits into one window is shuffled as a whole, before it is dealt.
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
class Order:
    """Order over a data set whose units have ``unit_rows`` rows."""

    unit_rows: tuple[int, ...]
    lanes: int
    window: int
    seed: int

    @property
    def rows(self) -> int:
        return sum(self.unit_rows)

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
        first = self.rows * window.lane // self.lanes
        sequence = self._sequence(window.epoch)
        if self.rows <= self.window:
            return sequence[first + window.start : first + window.stop]
        begin = window.start // self.window * self.window
        end = min(begin + self.window, self.lane_rows(window.lane))
        rows = self._slice(sequence, first + begin, first + end)
        rows = self._rng(window.epoch, 1, window.lane, begin).permutation(rows)
        return rows[window.start - begin : window.stop - begin]

    def _sequence(self, epoch: int) -> np.ndarray:
        """Permuted ordinals of a data set of one window; else the order of its units."""
        if self.rows <= self.window:
            return self._rng(epoch, 0).permutation(self.rows)
        return self._rng(epoch, 0).permutation(len(self.unit_rows))

    def _slice(self, units: np.ndarray, start: int, stop: int) -> np.ndarray:
        sizes = np.asarray(self.unit_rows)
        first_ordinal = np.cumsum(sizes) - sizes
        ends = np.cumsum(sizes[units])
        taken = []
        for i in range(np.searchsorted(ends, start, side="right"), len(units)):
            begin = ends[i] - sizes[units[i]]
            if begin >= stop:
                break
            low, high = max(start, begin) - begin, min(stop, ends[i]) - begin
            taken.append(first_ordinal[units[i]] + np.arange(low, high))
        return np.concatenate(taken)

    def _rng(self, epoch: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *purpose])

"""The order in which rows are trained on: a function of (seed, epoch, ordinal), of nothing else.

A step is made of ``lanes`` micro-batches. Each epoch is dealt to the lanes in equal slices (they differ by at most one
row), and lane m gives micro-batch m of every step. A worker reads whole lanes, so rows are read once however many
workers there are, and which rows form a micro-batch does not depend on the number of workers. Lanes go on into the next
epoch without a gap: the rows left over at the end of an epoch open the next epoch's first micro-batch.

The epoch's sequence is the units (row groups) in random order; it is shuffled within windows of ``window`` rows. A data
set that fits into one window is shuffled as a whole, before it is dealt.

A run may go on with another number of lanes: what its lanes have left of the epochs in flight is dealt anew
(``cursor.py``), as ranges of the sequence that the epoch was begun with. Later epochs are dealt as ever.

A mixture plans round(weight * rows) samples of each source an epoch: its rows as often as they go in whole, and of the
rest a stretch that moves on with every epoch, so that all rows have their turn. A row that is planned again in the same
epoch has the ordinal of its first time plus the number of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from simla_ray.data.cursor import Cursor


@dataclass(frozen=True)
class Position:
    """Place in a lane: rows of epoch ``epoch`` before ``offset`` have been passed."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Deal:
    """What lanes get of an epoch: pieces (first place, number of rows) of the sequence that it has in ``lanes`` lanes.

    The pieces in a row are cut into equal slices, one for each lane of the run.
    """

    lanes: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return sum(n for _, n in self.pieces)

    def slice(self, lane: int, of: int) -> tuple[int, int]:
        """Where the slice of a lane of ``of`` lanes begins and ends among the rows."""
        return self.rows * lane // of, self.rows * (lane + 1) // of


@dataclass(frozen=True)
class Window:
    """Rows [start, stop) of a lane's slice of an epoch, read together.

    They stand at ``first`` and after in the sequence that the epoch has in ``dealt`` lanes.
    """

    lane: int
    epoch: int
    start: int
    stop: int
    dealt: int
    first: int


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

    def deal(self, epoch: int, deals: Mapping[int, Deal]) -> Deal:
        """How an epoch is dealt: as ``deals`` says, else the whole of it over this order's lanes."""
        return deals.get(epoch) or Deal(self.lanes, ((0, self.rows),))

    def steps(self, cursor: Cursor, epochs: float, micro: int) -> int:
        """Steps from a cursor until every lane has passed ``epochs`` epochs, the last ones rounded up to full
        micro-batches.
        """
        longest = 0
        for lane, at in enumerate(cursor.positions):
            rows = -at.offset
            for epoch in range(at.epoch, math.ceil(epochs)):
                start, stop = self.deal(epoch, cursor.deals).slice(lane, self.lanes)
                rows += math.ceil((stop - start) * min(1.0, epochs - epoch))
            longest = max(longest, rows)
        return -(-longest // micro)

    def windows(self, lane: int, at: Position, deals: Mapping[int, Deal]) -> Iterator[Window]:
        """The lane's windows from ``at`` on, epoch after epoch, without end.

        They end where their rows are shuffled apart, and at the multiples of ``window`` of the lane's own count.
        """
        epoch, offset = at.epoch, at.offset
        while True:
            deal = self.deal(epoch, deals)
            start, stop = deal.slice(lane, self.lanes)
            for first, n in cut_pieces(np.array(deal.pieces).reshape(-1, 2), start + offset, stop).tolist():
                while n:
                    shuffled_until = self._stretch(first, deal.lanes)[2]
                    own = self.window - offset % self.window
                    taken = min(n, own, shuffled_until - first)
                    yield Window(lane, epoch, offset, offset + taken, deal.lanes, first)
                    offset, first, n = offset + taken, first + taken, n - taken
            epoch, offset = epoch + 1, 0

    def ordinals(self, window: Window) -> np.ndarray:
        """(stop - start,) int64 ordinals of a window, in order."""
        pieces, n = self._pieces(window.epoch), window.stop - window.start
        lane, begin, end = self._stretch(window.first, window.dealt)
        shuffled = self._rng(window.epoch, 0)
        if self.rows <= self.window:
            rows = shuffled.permutation(_joined(pieces, 0, self.rows))
        else:
            pieces = pieces[shuffled.permutation(len(pieces))]
            own = self.rows * lane // window.dealt
            rows = self._rng(window.epoch, 1, lane, begin - own).permutation(_joined(pieces, begin, end))
        return rows[window.first - begin : window.first - begin + n]

    def _stretch(self, place: int, lanes: int) -> tuple[int, int, int]:
        """The lane, first and last place (excluded) of the stretch of a sequence within which a place is shuffled."""
        lane = ((place + 1) * lanes - 1) // self.rows
        if self.rows <= self.window:
            return lane, 0, self.rows
        own, stop = self.rows * lane // lanes, self.rows * (lane + 1) // lanes
        begin = own + (place - own) // self.window * self.window
        return lane, begin, min(begin + self.window, stop)

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
                pieces.append(cut_pieces(turn, low, high) + np.array([times * every, 0]))
        return np.concatenate(pieces)

    def _rng(self, epoch: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *purpose])


def cut_pieces(pieces: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The rows [start, stop) of a sequence of pieces (n, 2), as pieces."""
    ends = np.cumsum(pieces[:, 1])
    begins = ends - pieces[:, 1]
    low, high = np.maximum(begins, start), np.minimum(ends, stop)
    found = np.stack([pieces[:, 0] + low - begins, high - low], 1)
    return found[high > low]


def _joined(pieces: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The ordinals of the rows [start, stop) of a sequence of pieces."""
    return np.concatenate([np.arange(first, first + n) for first, n in cut_pieces(pieces, start, stop)])

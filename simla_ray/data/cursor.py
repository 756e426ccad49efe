"""What has been consumed: one position per lane, and how the epochs in flight were dealt.

A lane's order is fixed, so its position says exactly which rows the weights of a checkpoint have seen, dropped ones
included, at any number of workers. A few bytes per lane, whatever the size of the data set; a few more per lane and
epoch in flight where the number of lanes has changed in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from simla_ray.data.order import Deal, Order, Position, cut_pieces


@dataclass(frozen=True)
class Cursor:
    """``deals``: epochs that were begun with other lanes, and what they had left when those ended."""

    positions: tuple[Position, ...]
    deals: dict[int, Deal] = field(default_factory=dict)

    @classmethod
    def start(cls, lanes: int) -> Cursor:
        return cls((Position(),) * lanes)

    def moved(self, moves: Iterable[tuple[int, Position]]) -> Cursor:
        """The cursor with some lanes at new positions.

        Raises:
            ValueError: a lane would go backwards; that would train rows twice.
        """
        positions = list(self.positions)
        for lane, position in moves:
            if (position.epoch, position.offset) < (positions[lane].epoch, positions[lane].offset):
                raise ValueError(f"lane {lane} would go back from {positions[lane]} to {position}")
            positions[lane] = position
        begun = min(p.epoch for p in positions)
        return Cursor(tuple(positions), {epoch: deal for epoch, deal in self.deals.items() if epoch >= begun})

    def dealt_to(self, order: Order) -> Cursor:
        """The cursor for the lanes of an order: what is left of the epochs in flight is dealt anew to other lanes."""
        if len(self.positions) == order.lanes:
            return self
        before = replace(order, lanes=len(self.positions))
        epochs = [p.epoch for p in self.positions]
        deals = {}
        for epoch in range(min(epochs), max([*epochs, *self.deals]) + 1):
            left = self.left(before, epoch)
            if left.rows < order.rows:
                deals[epoch] = left
        return Cursor((Position(min(epochs)),) * order.lanes, deals)

    def left(self, order: Order, epoch: int) -> Deal:
        """What is left of an epoch."""
        deal = order.deal(epoch, self.deals)
        pieces: list[list[int]] = []
        for lane, at in enumerate(self.positions):
            start, stop = deal.slice(lane, order.lanes)
            passed = at.offset if at.epoch == epoch else (stop - start) * (at.epoch > epoch)
            for first, n in cut_pieces(np.array(deal.pieces).reshape(-1, 2), start + passed, stop).tolist():
                if pieces and sum(pieces[-1]) == first:
                    pieces[-1][1] += n
                else:
                    pieces.append([first, n])
        return Deal(deal.lanes, tuple((first, n) for first, n in pieces))

    def epochs(self, order: Order) -> float:
        """Epochs passed, with the parts of those in flight."""
        epochs = [p.epoch for p in self.positions]
        begun, last = min(epochs), max([*epochs, *self.deals])
        passed = [order.rows - self.left(order, epoch).rows for epoch in range(begun, last + 1)]
        return begun + sum(passed) / order.rows

    def to_json(self) -> dict[str, Any]:
        return {
            "lanes": [[p.epoch, p.offset] for p in self.positions],
            "deals": {str(epoch): [deal.lanes, deal.pieces] for epoch, deal in self.deals.items()},
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Cursor:
        deals = {
            int(epoch): Deal(lanes, tuple((first, n) for first, n in pieces))
            for epoch, (lanes, pieces) in stored["deals"].items()
        }
        return cls(tuple(Position(epoch, offset) for epoch, offset in stored["lanes"]), deals)

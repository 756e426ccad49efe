"""What has been consumed: one position per lane.

A lane's order is fixed, so its position says exactly which rows the weights of a checkpoint have seen, dropped ones
included, at any number of workers. A few bytes per lane, whatever the size of the data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from simla_ray.data.order import Position
from simla_ray.errors import UserError


@dataclass(frozen=True)
class Cursor:
    positions: tuple[Position, ...]

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
        return Cursor(tuple(positions))

    def epochs(self, lane_rows: list[int]) -> float:
        """Mean number of epochs passed."""
        passed = [p.epoch + p.offset / n for p, n in zip(self.positions, lane_rows, strict=True)]
        return sum(passed) / len(passed)

    def to_json(self) -> list[list[int]]:
        return [[p.epoch, p.offset] for p in self.positions]

    @classmethod
    def from_json(cls, stored: list[list[int]], lanes: int) -> Cursor:
        if len(stored) != lanes:
            raise UserError(f"the checkpoint's cursor has {len(stored)} lanes, this run {lanes} micro-batches per step")
        return cls(tuple(Position(epoch, offset) for epoch, offset in stored))

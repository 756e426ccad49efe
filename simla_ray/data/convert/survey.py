"""What must be known of all rows before the first is written: uids that come twice, columns, and bytes per row.

A Ray Data job over everything but the images (tars are read whole, there is no other way to their texts), and a few
rows of each source that are converted on trial.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simla_ray.data.convert.jobs import run_job
from simla_ray.data.convert.rows import digest, encoded_bytes, pictures_of, present
from simla_ray.data.decode import DropRow
from simla_ray.data.index import Index, repeats
from simla_ray.data.schema import OPTIONAL
from simla_ray.data.sources import read_pieces, row_numbers

#: Rows of a task that reads: small units together, large ones in parts.
FEW_ROWS, MANY_ROWS = 256, 4096
#: Of each source, rows that are converted on trial, from this many places.
TRIAL_PLACES, TRIAL_ROWS = 8, 4

DIGEST = np.dtype("S16")


@dataclass(frozen=True)
class Place:
    """Where a row stands: its ordinal, its file, its number in the file (from 0)."""

    ordinal: int
    file: str
    number: int


@dataclass(frozen=True)
class Survey:
    """``columns``: optional ones that any row has. ``duplicates``: ordinals of rows whose uid an earlier row has."""

    columns: tuple[str, ...]
    duplicates: tuple[int, ...]
    row_bytes: np.ndarray  # (rows,) float32, estimated


def survey(index: Index, max_pixels: int, max_px: int | None, tasks: int) -> Survey:
    """Look at all rows, in parallel.

    Raises:
        UserError: a file cannot be read.
    """
    items = [{"start": start, "stop": stop} for start, stop in stretches(index)]
    digests, columns = [], 0
    for block in run_job(items, _Look(index), tasks):
        digests.append(np.stack([block["high"], block["low"]], axis=1))
        columns |= int(np.bitwise_or.reduce(block["columns"]))
    return Survey(
        tuple(name for bit, name in enumerate(OPTIONAL) if columns >> bit & 1),
        tuple(repeats(as_digests(np.concatenate(digests).astype("<u8").tobytes())).tolist()),
        _row_bytes(index, max_pixels, max_px),
    )


def as_digests(raw: bytes) -> np.ndarray:
    """(n,) of 16 bytes each, to be compared and sorted."""
    return np.frombuffer(raw, DIGEST)


def stretches(index: Index) -> Iterator[tuple[int, int]]:
    """Ordinals start..stop of one task each."""
    start = stop = 0
    for unit in index.units:
        for n in [MANY_ROWS] * (len(unit) // MANY_ROWS) + [len(unit) % MANY_ROWS]:
            stop += n
            if stop - start >= FEW_ROWS:
                yield start, stop
                start = stop
    if stop > start:
        yield start, stop


def rows_between(
    index: Index, start: int, stop: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Rows of the ordinals start..stop, in order, with their places; a piece of a unit is in memory at a time."""
    for unit, places, where in index.locate(np.arange(start, stop)):
        done = start + int(where[0])
        for part, rows in read_pieces(unit, places, columns, index.roots):
            for number, row in zip(row_numbers(unit, part).tolist(), rows, strict=True):
                yield Place(done, unit.path, number), row
                done += 1


class _Look:
    def __init__(self, index: Index):
        self.index = index

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            raw, columns = [], []
            for _, row in rows_between(self.index, start, stop, ("uid", "captions", *OPTIONAL)):
                raw.append(digest(row["uid"]))
                columns.append(sum(1 << OPTIONAL.index(name) for name in present(row)))
            halves = np.frombuffer(b"".join(raw), "<u8").reshape(-1, 2)
            yield {"high": halves[:, 0], "low": halves[:, 1], "columns": np.array(columns, np.int64)}


def _row_bytes(index: Index, max_pixels: int, max_px: int | None) -> np.ndarray:
    """Of every row the mean of its source's trial rows."""
    estimates: list[np.ndarray] = []
    units = iter(index.units)
    first = 0
    for n_units in index.per_uri:
        n = sum(len(u) for u in itertools.islice(units, n_units))
        if n:
            spread = np.unique(np.linspace(0, max(0, n - TRIAL_ROWS), TRIAL_PLACES).astype(int))
            sizes = [
                size for at in spread.tolist()
                for size in _trial(index, first + at, first + min(at + TRIAL_ROWS, n), max_pixels, max_px)
            ]  # fmt: skip
            estimates.append(np.full(n, max(1.0, float(np.mean(sizes)) if sizes else 1.0), np.float32))
        first += n
    return np.concatenate(estimates)


def _trial(index: Index, start: int, stop: int, max_pixels: int, max_px: int | None) -> Iterator[int]:
    for _, row in rows_between(index, start, stop):
        try:
            size = encoded_bytes(pictures_of(row, max_pixels, max_px))
        except DropRow:
            continue
        yield size + sum(len(str(c)) for c in row["captions"])

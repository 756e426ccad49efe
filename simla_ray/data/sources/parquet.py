"""Parquet: a unit is a row group."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simla_ray.data.schema import resolve_columns
from simla_ray.data.sources import files
from simla_ray.data.sources.unit import Unit, numbered
from simla_ray.errors import UserError

#: Of a row group that is read in pieces: rows at a time, and bytes of each column read ahead.
PIECE_ROWS = 64
BUFFER = 2**20


def units(file: str, split: str | None, split_key: str) -> list[Unit]:
    """From the footer; with a split filter also from that column."""
    parquet = _open(file)
    names = parquet.schema_arrow.names
    resolve_columns(names, file)
    if split is not None and "split" not in names:
        raise UserError(f"{split_key}: {split}, but {file} has no split column")
    found = []
    for group in range(parquet.num_row_groups):
        rows = None
        if split is not None:
            column = _group(file, group, ["split"]).column(0).to_pylist()
            rows = tuple(i for i, value in enumerate(column) if value == split)
        found.append(Unit(file, group, parquet.metadata.row_group(group).num_rows, rows))
    return found


def rows(
    unit: Unit, inside: np.ndarray, columns: Sequence[str] | None, roots: Sequence[str]
) -> list[tuple[dict[str, Any], str]]:
    """The rows with their own uids' stand-ins."""
    ours_of = _ours_of(unit, columns)
    table = _group(unit.path, unit.number, list(ours_of)).take(pa.array(inside))
    return _rows(unit, table, inside, ours_of)


def pieces(unit: Unit, inside: np.ndarray, columns: Sequence[str] | None) -> Iterator[list[tuple[dict[str, Any], str]]]:
    """The rows of a file on disk, in their order, some at a time, and no more of them in memory.

    Args:
        inside: ascending, at least one.

    Raises:
        UserError: the file is gone or damaged.
    """
    ours_of = _ours_of(unit, columns)
    try:
        with pq.ParquetFile(unit.path, buffer_size=BUFFER) as parquet:
            start = 0
            for batch in parquet.iter_batches(PIECE_ROWS, [unit.number], list(ours_of), use_threads=False):
                here = inside[(inside >= start) & (inside < start + len(batch))]
                if len(here):
                    table = pa.Table.from_batches([batch]).take(pa.array(here - start))
                    yield _rows(unit, table, here, ours_of)
                start += len(batch)
                if start > inside[-1]:
                    return
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{unit.path}: cannot be read ({str(error).splitlines()[0]})") from None


def first_row(unit: Unit) -> int:
    """Rows of the file before the unit."""
    metadata = _open(unit.path).metadata
    return sum(metadata.row_group(g).num_rows for g in range(unit.number))


def _ours_of(unit: Unit, columns: Sequence[str] | None) -> dict[str, str]:
    names = resolve_columns(_open(unit.path).schema_arrow.names, unit.path)
    return {theirs: ours for ours, theirs in names.items() if columns is None or ours in columns}


def _rows(unit: Unit, table: pa.Table, inside: np.ndarray, ours_of: dict[str, str]) -> list[tuple[dict[str, Any], str]]:
    table = table.rename_columns([ours_of[n] for n in table.column_names])
    first = first_row(unit)
    return [(row, numbered(unit.path, first + int(i))) for row, i in zip(table.to_pylist(), inside, strict=True)]


def column(unit: Unit, name: str) -> list[Any]:
    """See ``read_column``."""
    parquet = _open(unit.path)
    if name not in parquet.schema_arrow.names:
        return []
    return _group(unit.path, unit.number, [name]).column(0).to_pylist()


def _group(path: str, number: int, columns: list[str]) -> pa.Table:
    """Some columns of a row group. A file in a store is opened anew before it is asked again."""

    def read() -> pa.Table:
        try:
            return _open(path).read_row_group(number, columns=columns, use_threads=False)
        except OSError:
            _open.cache_clear()
            raise

    return files.retried(path, read)


@functools.lru_cache(maxsize=64)
def _open(path: str) -> pq.ParquetFile:
    try:
        return files.retried(path, lambda: pq.ParquetFile(files.opened(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None

"""Parquet: a unit is a row group. One whose bytes are there and do not decode costs its rows, of which the footer has
the count.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simla_ray.data.schema import columns_behind, resolve_columns
from simla_ray.data.sources import files
from simla_ray.data.sources.unit import DataFile, Unit
from simla_ray.errors import UserError

#: Of a row group that is read in pieces: rows at a time, and bytes of each column read ahead.
PIECE_ROWS = 64
BUFFER = 2**20
UNREADABLE = "row_group_unreadable"


class Damaged(Exception):
    """A row group that cannot be decoded, whoever fetches its bytes."""


def units(data: DataFile, split: str | None, split_key: str) -> list[Unit]:
    """From the footer; with a split filter also from that column."""
    file = data.path
    parquet = _open(file)
    names = parquet.schema_arrow.names
    columns = resolve_columns(names, file)
    for ours, (allowed, fits) in KINDS.items():
        if ours not in columns:
            continue
        kind = parquet.schema_arrow.field(columns[ours]).type
        if not pa.types.is_null(kind) and not fits(kind):
            raise UserError(f"{file}: column {columns[ours]} is {kind}; allowed: {allowed}")
    if split is not None and "split" not in names:
        raise UserError(f"{split_key}: {split}, but {file} has no split column")
    found = []
    for group in range(parquet.num_row_groups):
        rows = None
        if split is not None:
            try:
                column = _values(_group(file, group, ["split"]).column(0))
            except Damaged as error:
                raise UserError(f"{split_key}: the split column of {file} is damaged in {error}") from None
            rows = tuple(i for i, value in enumerate(column) if value == split)
        found.append(Unit(file, group, parquet.metadata.row_group(group).num_rows, rows))
    return found


def rows(
    unit: Unit, inside: np.ndarray, columns: Sequence[str] | None, roots: Sequence[str]
) -> list[tuple[dict[str, Any], str]]:
    """The rows with their own uids' stand-ins; of a damaged row group the reason, and the uids if they can be read."""
    ours_of = _ours_of(unit, columns)
    try:
        return _rows(unit, _group(unit.path, unit.number, list(ours_of)), inside, inside, ours_of)
    except Damaged:
        return _lost(unit, inside, ours_of)


def _lost(unit: Unit, inside: np.ndarray, ours_of: dict[str, str]) -> list[tuple[dict[str, Any], str]]:
    uid = {theirs: ours for theirs, ours in ours_of.items() if ours == "uid"}
    table = pa.table({})
    if uid:
        with contextlib.suppress(Damaged):
            table = _group(unit.path, unit.number, list(uid))
    return [(row | {"image": UNREADABLE}, stand_in) for row, stand_in in _rows(unit, table, inside, inside, uid)]


def pieces(unit: Unit, inside: np.ndarray, columns: Sequence[str] | None) -> Iterator[list[tuple[dict[str, Any], str]]]:
    """The rows of a file on disk, in their order, some at a time, and no more of them in memory.

    What comes before a damaged place is read; what follows it is lost, as by ``rows``.

    Args:
        inside: ascending, at least one.

    Raises:
        UserError: the file is gone.
    """
    ours_of, start = _ours_of(unit, columns), 0
    try:
        with pq.ParquetFile(unit.path, buffer_size=BUFFER) as parquet:
            for batch in parquet.iter_batches(PIECE_ROWS, [unit.number], list(ours_of), use_threads=False):
                here = inside[(inside >= start) & (inside < start + len(batch))]
                if len(here):
                    yield _rows(unit, pa.Table.from_batches([batch]), here - start, here, ours_of)
                start += len(batch)
                if start > inside[-1]:
                    return
    except (OSError, pa.ArrowException):
        pass  # reading what is left finds out why
    left = inside[inside >= start]
    if len(left):
        yield rows(unit, left, columns, ())


def first_row(unit: Unit) -> int:
    """Rows of the file before the unit."""
    metadata = _open(unit.path).metadata
    return sum(metadata.row_group(g).num_rows for g in range(unit.number))


def _ours_of(unit: Unit, columns: Sequence[str] | None) -> dict[str, str]:
    names = resolve_columns(_open(unit.path).schema_arrow.names, unit.path)
    needed = names if columns is None else columns_behind(columns, names)
    return {theirs: ours for ours, theirs in names.items() if ours in needed}


def _rows(
    unit: Unit, table: pa.Table, places: np.ndarray, inside: np.ndarray, ours_of: dict[str, str]
) -> list[tuple[dict[str, Any], str]]:
    """Rows of a table, by their places in it, which are rows ``inside`` the unit."""
    values = [_values(_taken(column, places)) for column in table.columns]
    ours = [ours_of[name] for name in table.column_names]
    first, found = first_row(unit), []
    for i, *row in zip(inside, *values, strict=True):
        found.append((dict(zip(ours, row, strict=True)), f"{unit.name}:{first + int(i)}"))
    return found


def column(unit: Unit, name: str) -> list[Any]:
    """See ``read_column``."""
    if name not in _open(unit.path).schema_arrow.names:
        return []
    try:
        return _values(_group(unit.path, unit.number, [name]).column(0))
    except Damaged:
        return []


def _taken(column: pa.ChunkedArray, inside: np.ndarray) -> pa.ChunkedArray:
    """Some rows, in the given order."""
    try:
        return column.take(pa.array(inside))
    except pa.ArrowNotImplementedError:  # pyarrow takes no views, such as string_view
        return pa.chunked_array([c for i in inside.tolist() for c in column.slice(i, 1).chunks], column.type)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """As Python values. Text that is not UTF-8, which Parquet lets in, keeps its bytes as surrogates."""
    if (kind := singles(column.type)) != column.type:
        column = column.cast(kind)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value, column.type) for value in column.cast(_undecoded(column.type)).to_pylist()]


def singles(kind: pa.DataType) -> pa.DataType:
    """The type with float32 in place of float16, also in lists: pyarrow makes halves of Python's numbers, and these of
    halves, fifty times slower.
    """
    if pa.types.is_float16(kind):
        return pa.float32()
    if _is_list(kind) and (inner := singles(kind.value_type)) != kind.value_type:
        return pa.large_list(inner)
    return kind


def _undecoded(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of text."""
    if _is_text(kind):
        return pa.large_binary()
    if _is_list(kind):
        return pa.large_list(_undecoded(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_undecoded(field.type)) for field in kind])
    return kind


def _decoded(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if _is_text(kind):
        return value.decode("utf-8", "surrogateescape")
    if _is_list(kind):
        return [_decoded(entry, kind.value_type) for entry in value]
    if pa.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    return value


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_captions(kind: pa.DataType) -> bool:
    entry = kind.value_type if _is_list(kind) else kind
    return _is_text(entry) or _is_bytes(entry) or pa.types.is_null(entry)


#: Columns of which the type is checked at the start: what is allowed, in words and as a test.
KINDS = {
    "image": ("binary (the encoded picture), or a struct with bytes", _is_image),
    "captions": ("text, or a list of texts", _is_captions),
}


def _group(path: str, number: int, columns: list[str]) -> pa.Table:
    """Some columns of a row group.

    Raises:
        Damaged: it does not decode, says its file's name and its number.
        UserError: its bytes cannot be fetched.
    """
    try:
        return _decoded_group(_open(path), number, columns)
    except (OSError, pa.ArrowException):
        if files.is_remote(path):
            _open.cache_clear()  # a connection that broke stays broken
    # Damaged bytes raise the same errors as a disk or a store that fails, which is no reason to drop rows: so the bytes
    # are fetched first, and then decoded by themselves.
    metadata = _open(path).metadata
    with tempfile.TemporaryFile() as copy:
        try:
            files.retried(path, lambda: _fetch(path, metadata.row_group(number), columns, copy))
            return _decoded_group(pq.ParquetFile(copy, metadata=metadata), number, columns)
        except (OSError, pa.ArrowException) as error:
            raise Damaged(f"row group {number} of {path} ({str(error).splitlines()[0]})") from None


def _decoded_group(parquet: pq.ParquetFile, number: int, columns: list[str]) -> pa.Table:
    table = parquet.read_row_group(number, columns=columns, use_threads=False)
    if len(table) != parquet.metadata.row_group(number).num_rows:
        raise pa.ArrowInvalid(f"{len(table)} rows, its footer says {parquet.metadata.row_group(number).num_rows}")
    return table


def _fetch(path: str, group: pq.RowGroupMetaData, columns: list[str], copy: IO[bytes]) -> None:
    """The bytes of some columns, written to the places of a file at which they stand in the original."""
    size = files.size(path)
    with files.opened(path) as file:
        for chunk in (group.column(i) for i in range(group.num_columns)):
            start = min(at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at)
            n = chunk.total_compressed_size
            if chunk.path_in_schema.partition(".")[0] not in columns or not 0 <= start <= start + n <= size:
                continue  # outside of the file there is nothing to fetch; decoding says so
            file.seek(start)
            copy.seek(start)
            copy.write(file.read(n))


@functools.lru_cache(maxsize=64)
def _open(path: str) -> pq.ParquetFile:
    try:
        return files.retried(path, lambda: pq.ParquetFile(files.opened(path)))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None

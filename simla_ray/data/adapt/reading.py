"""Files of annotations: JSON, JSON lines and tables, each mistake in one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simla_ray.data.sources.listed import what_is_wrong
from simla_ray.errors import UserError

Hook = Callable[[dict[str, Any]], Any]


def read_json(path: Path, hook: Hook | None = None) -> Any:
    """A JSON file as a whole; ``hook`` may make something smaller of each object.

    Raises:
        UserError: it is none; with line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_hook=hook)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {what_is_wrong(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None


def read_entries(
    path: Path, needed: Sequence[str], older: Mapping[str, str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Entries of a JSON list or of JSON lines, whatever the file is called, each with its place.

    Args:
        needed: fields that the first entry must have.
        older: older name of a field -> its name.

    Raises:
        UserError: a line or the list cannot be read, or the entries are of another format.
    """
    checked = False
    for place, entry in _entries(path):
        if not isinstance(entry, dict):
            raise UserError(f"{path}, {place}: expected an object, found {type(entry).__name__}")
        for name, ours in (older or {}).items():
            if name in entry and ours not in entry:
                entry[ours] = entry.pop(name)
        if not checked:
            need(path, entry, needed)
            checked = True
        yield place, entry
    if not checked:
        raise UserError(f"{path}: holds no entry")


def need(path: Path, entry: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Raise ``UserError`` where an entry lacks fields of the format."""
    missing = [name for name in fields if name not in entry]
    if missing:
        names = map(str, list(entry)[:12])
        found = ", ".join(name if name.isprintable() else repr(name) for name in names) or "nothing"
        raise UserError(f"{path}: no field {', '.join(missing)}; found {found}")


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet, CSV or TSV file, or of JSON (lines), each with its place.

    Raises:
        UserError: it cannot be read or holds nothing.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        yield from _csv(path)
    else:
        yield from read_entries(path, ())


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if line.lstrip().startswith("["):
                    break
                yield f"line {number}", _line(path, number, line)
            else:
                return
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON lines ({error})") from None
    found = read_json(path)
    for number, entry in enumerate(found):
        yield f"entry {number}", entry


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}, column {error.colno}: {what_is_wrong(error)}") from None
    except RecursionError as error:
        raise UserError(f"{path}, line {number}: not a readable JSON file ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            columns = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
            number = 0
            for batch in file.iter_batches(columns=columns):
                for entry in batch.to_pylist():
                    yield f"row {number}", entry
                    number += 1
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, entry in enumerate(csv.DictReader(file, delimiter=delimiter, restval="")):
                entry.pop(None, None)  # type: ignore[call-overload]
                yield f"row {number}", {name.strip(): value for name, value in entry.items()}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None

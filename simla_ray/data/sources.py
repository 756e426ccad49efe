"""Files of captioned images: what is in them, and reading some of their rows."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simla_ray.data.schema import normalise, resolve_columns
from simla_ray.errors import UserError

JSON_UNIT_ROWS = 1000


@dataclass(frozen=True)
class Unit:
    """Rows that are read together: a row group of a Parquet file, or a stretch of a JSON list.

    ``rows`` are the places in the unit that the split filter keeps; None keeps all ``n``.
    """

    path: str
    number: int
    n: int
    rows: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.n if self.rows is None else len(self.rows)


def list_files(uris: Sequence[str], key: str) -> list[Path]:
    """Files behind paths, folders and globs, in order.

    Raises:
        UserError: naming the key and the URI that gives no file, or a format that is not read.
    """
    files: list[Path] = []
    for uri in uris:
        path = Path(uri).absolute()  # workers run elsewhere
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in (".parquet", ".json"))
        elif any(c in uri for c in "*?["):
            found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        else:
            found = [path] if path.exists() else []
        if not found:
            raise UserError(f"{key}: {uri} does not exist or holds no .parquet or .json file")
        for file in found:
            if file.suffix not in (".parquet", ".json"):
                raise UserError(f"{key}: {file} is neither .parquet nor an ALBEF .json list")
        files += found
    return files


def units_of(file: Path, split: str | None, split_key: str) -> list[Unit]:
    """The units of a file, without reading an image."""
    if file.suffix == ".json":
        if split is not None:
            raise UserError(f"{split_key}: {split}, but {file} is a JSON list and has no split column")
        n = len(_json_rows(str(file)))
        if n:
            resolve_columns(_json_rows(str(file))[0].keys(), str(file))
        return [Unit(str(file), i, min(JSON_UNIT_ROWS, n - i)) for i in range(0, n, JSON_UNIT_ROWS)]
    parquet = _open(str(file))
    names = parquet.schema_arrow.names
    resolve_columns(names, str(file))
    if split is not None and "split" not in names:
        raise UserError(f"{split_key}: {split}, but {file} has no split column")
    units = []
    for group in range(parquet.num_row_groups):
        rows = None
        if split is not None:
            column = parquet.read_row_group(group, columns=["split"]).column(0).to_pylist()
            rows = tuple(i for i, value in enumerate(column) if value == split)
        units.append(Unit(str(file), group, parquet.metadata.row_group(group).num_rows, rows))
    return [u for u in units if len(u)]


def read_rows(
    unit: Unit, places: np.ndarray, columns: Sequence[str] | None, roots: Sequence[str]
) -> list[dict[str, Any]]:
    """Some rows of a unit, in the given order, under our names.

    Args:
        places: numbers of rows among those the unit keeps.
        columns: our names of the columns wanted; None for all there are.
        roots: folders that image paths of a JSON list may point into; empty: the folder of the list.

    Returns:
        Rows; the image of a JSON row is a ``Path``, or a ``str`` with the reason why it is not read.
    """
    inside = places if unit.rows is None else np.asarray(unit.rows)[places]
    if unit.path.endswith(".json"):
        listed = _json_rows(unit.path)
        columns_of_list = resolve_columns(listed[0], unit.path)
        allowed = [Path(r) for r in roots] or [Path(unit.path).parent]
        rows = []
        for i in (unit.number + int(p) for p in inside):
            entry = {ours: listed[i].get(theirs) for ours, theirs in columns_of_list.items()}
            path = entry["image"]
            image = _inside(str(path), allowed) if path else "image_missing"
            if path:
                entry.setdefault("image_id", str(path))
            rows.append(normalise(entry | {"image": image}, _uid(unit, i)))
        return rows
    parquet = _open(unit.path)
    names = resolve_columns(parquet.schema_arrow.names, unit.path)
    if columns is not None:
        names = {ours: theirs for ours, theirs in names.items() if ours in columns}
    table = parquet.read_row_group(unit.number, columns=list(names.values()), use_threads=False)
    table = table.take(pa.array(inside)).rename_columns([_ours(names, n) for n in table.column_names])
    first = sum(parquet.metadata.row_group(g).num_rows for g in range(unit.number))
    return [normalise(row, _uid(unit, first + int(i))) for row, i in zip(table.to_pylist(), inside, strict=True)]


def _uid(unit: Unit, row: int) -> str:
    """Uid of a row that brings none: folder and name of the file tell shards of one name apart."""
    path = Path(unit.path)
    return f"{path.parent.name}/{path.stem}:{row}"


def _ours(names: dict[str, str], theirs: str) -> str:
    return next(ours for ours, name in names.items() if name == theirs)


def _inside(path: str, roots: Sequence[Path]) -> Path | str:
    """The file a JSON list names, if it lies in an allowed folder (links resolved); else the drop reason."""
    for root in roots:
        candidate = (root / path).resolve()
        if candidate.is_relative_to(root.resolve()):
            if candidate.is_file():
                return candidate
            reason = "image_missing"
            continue
        reason = "image_outside_roots"
    return reason


@functools.lru_cache(maxsize=64)
def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


@functools.lru_cache(maxsize=4)
def _json_rows(path: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f'{path}: expected a list of {{"image": path, "caption": text}}')
    return rows


def read_column(unit: Unit, column: str) -> list[Any]:
    """The values of one column, by its name in the file; empty where there is no such column."""
    if unit.path.endswith(".json"):
        return [row.get(column) for row in _json_rows(unit.path)[unit.number : unit.number + unit.n]]
    parquet = _open(unit.path)
    if column not in parquet.schema_arrow.names:
        return []
    return parquet.read_row_group(unit.number, columns=[column]).column(0).to_pylist()

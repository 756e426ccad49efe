"""Files of captioned images: what is in them, and reading some of their rows.

One file per kind of file: Parquet, webdataset tars, and what is read as a whole (lists in JSON, CSV and TSV, COCO's
captions, a folder of images). All give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from simla_ray.data.schema import MADE_OF, columns_behind, normalise
from simla_ray.data.sources import files, listed, parquet, tar
from simla_ray.data.sources.listing import LISTS, MANIFEST, list_files
from simla_ray.data.sources.names import told_apart
from simla_ray.data.sources.unit import DataFile, Unit

__all__ = [
    "MANIFEST",
    "DataFile",
    "Unit",
    "images_are_files",
    "list_files",
    "names_of",
    "read_column",
    "read_pieces",
    "read_rows",
    "read_words",
    "row_numbers",
    "units_of",
]

READERS: dict[str, Any] = {"parquet": parquet, "tar": tar, **dict.fromkeys(LISTS, listed)}


def names_of(found: Sequence[DataFile]) -> dict[DataFile, str]:
    """What the rows of each file that bring no uid are called after: a tar's ``name/key``, else ``name:row``.

    A tar is called by its own name, other files by their folder's and their own; where that does not tell the files of
    a set apart, see ``told_apart``. The rows of a folder of images are called by their paths in it, with the folder's
    name before them only if another folder of the set has a row of the same name.
    """
    names = {}
    for file in found:
        path = files.pure(file.path)
        own = path.stem if file.format == "tar" else f"{path.parent.name}/{path.stem}"
        names[file] = own if file.format != "folder" else ""
    apart = told_apart({file.path: name for file, name in names.items()})
    shared = listed.share_names([file for file in names if file.format == "folder"])
    return {file: apart[file.path] if name or shared else "" for file, name in names.items()}


def units_of(file: DataFile, name: str, split: str | None, split_key: str) -> list[Unit]:
    """The units of a file, without reading an image.

    Args:
        name: see ``names_of``.

    Raises:
        UserError: it cannot be read, lacks a column, or has no splits where one is asked for.
    """
    units = READERS[file.format].units(file, split, split_key)
    return [replace(unit, format=file.format, name=name) for unit in units if len(unit)]


def read_rows(
    unit: Unit, places: np.ndarray, columns: Sequence[str] | None, roots: Sequence[str]
) -> list[dict[str, Any]]:
    """Some rows of a unit, in the given order, under our names.

    Args:
        places: numbers of rows among those the unit keeps.
        columns: our names of the columns wanted; None for all there are.
        roots: folders that image paths of lists may point into; empty: the folder of the list.

    Returns:
        Rows; an image is bytes, a ``Path``, or a ``str`` with the reason why it is not read.
    """
    inside = places if unit.rows is None else np.asarray(unit.rows)[places]
    found = READERS[unit.format].rows(unit, inside, columns, roots)
    return [_row(row, uid, columns) for row, uid in found]


def _row(row: dict[str, Any], uid: str, columns: Sequence[str] | None) -> dict[str, Any]:
    """Under our names, with the columns wanted: what nobody asked for cannot make a row unusable."""
    if columns is None:
        return normalise(row, uid)
    needed = columns_behind(columns, row)
    row = normalise({name: value for name, value in row.items() if name in needed}, uid)
    for name in MADE_OF.keys() | needed:
        if name not in columns and name in row:
            row.pop(name)
    return {"captions": []} | row


def read_words(unit: Unit, roots: Sequence[str]) -> list[tuple[str, list[Any]]]:
    """Uid and captions of all rows of a unit."""
    rows = read_rows(unit, np.arange(len(unit)), ("uid", "captions"), roots)
    return [(row["uid"], row["captions"]) for row in rows]


def read_pieces(
    unit: Unit, places: np.ndarray, columns: Sequence[str] | None, roots: Sequence[str]
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """``read_rows`` piece by piece, with the places of each piece: a row group on disk need not fit into memory.

    Args:
        places: ascending.
    """
    if unit.format != "parquet" or files.is_remote(unit.path):
        yield places, read_rows(unit, places, columns, roots)
        return
    inside = places if unit.rows is None else np.asarray(unit.rows)[places]
    done = 0
    for found in parquet.pieces(unit, inside, columns):
        yield places[done : done + len(found)], [_row(row, uid, columns) for row, uid in found]
        done += len(found)


def row_numbers(unit: Unit, places: np.ndarray) -> np.ndarray:
    """Numbers of rows in their file, from 0."""
    inside = places if unit.rows is None else np.asarray(unit.rows)[places]
    return inside + (parquet.first_row(unit) if unit.format == "parquet" else unit.number)


def read_column(unit: Unit, column: str) -> list[Any]:
    """The values of one column, by its name in the file; empty where there is no such column."""
    return READERS[unit.format].column(unit, column)


def images_are_files(unit: Unit) -> bool:
    """Whether images lie beside the data file."""
    return unit.format in LISTS

"""Files of captioned images: what is in them, and reading some of their rows.

One file per kind of file: Parquet, webdataset tars, and what is read as a whole (lists in JSON, CSV and TSV, COCO's
captions, a folder of images). All give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from simla_ray.data.schema import normalise
from simla_ray.data.sources import files, listed, parquet, tar
from simla_ray.data.sources.names import told_apart
from simla_ray.data.sources.unit import Unit
from simla_ray.errors import UserError

__all__ = [
    "MANIFEST",
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

READERS = {
    ".parquet": parquet,
    ".tar": tar,
    ".json": listed,
    ".csv": listed,
    ".tsv": listed,
}
#: What a converted data set says of itself; in a folder it is no list of images.
MANIFEST = "manifest.json"
KNOWN = ", ".join(READERS)
STREAMED = ", ".join(ending for ending, reader in READERS.items() if reader is not listed)


def list_files(uris: Sequence[str], key: str) -> list[str]:
    """Files behind paths, folders and globs, in order; a folder of images with their captions is one of them.

    Raises:
        UserError: naming the key and the URI that gives no file, or a format that is not read.
    """
    found: list[str] = []
    for uri in uris:
        in_store = files.is_remote(uri)
        here = files.listed(uri) if in_store else [str(path) for path in _on_disk(uri)]
        if in_store and len(here) > 1:  # of a folder or a pattern the data files, whatever else lies there
            here = [file for file in here if _holds_rows(files.pure(file))]
        if not here:
            raise UserError(f"{key}: {uri} does not exist or holds no file of {KNOWN}, and no images")
        for file in here:
            if files.pure(file).suffix not in READERS and (in_store or not Path(file).is_dir()):
                raise UserError(f"{key}: {file} is none of {KNOWN}, or a folder of images")
            if in_store and _reader(file) is listed:
                raise UserError(
                    f"{key}: {file} is a list, whose images are files; from a store only {STREAMED} are read"
                )
        found += here
    return found


def _on_disk(uri: str) -> list[Path]:
    path = Path(uri).absolute()  # workers run elsewhere
    if path.is_dir():
        return _in_folder(path)
    if any(c in uri for c in "*?["):
        return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    return [path] if path.exists() else []


def _in_folder(path: Path) -> list[Path]:
    """The data files that lie in a folder, or the folder itself where they are its images' captions."""
    found = sorted(p for p in path.iterdir() if _holds_rows(p) and p.is_file())
    if all(p.suffix == ".json" for p in found) and listed.is_image_folder(path):
        return [path]
    return found


def _holds_rows(path: PurePath) -> bool:
    return path.suffix in READERS and path.name != MANIFEST


def names_of(found: Sequence[str]) -> dict[str, str]:
    """What the rows of each file that bring no uid are called after: a tar's ``name/key``, else ``name:row``.

    A tar is called by its own name, other files by their folder's and their own; where that does not tell the files of
    a set apart, see ``told_apart``. The rows of a folder of images are called by their paths in it, with the folder's
    name before them only if another folder of the set has a row of the same name.
    """
    folders = [file for file in found if not files.is_remote(file) and Path(file).is_dir()]
    names = {}
    for file in found:
        path = files.pure(file)
        names[file] = path.stem if _reader(file) is tar else f"{path.parent.name}/{path.stem}"
    names |= dict.fromkeys(folders, "")
    apart = told_apart(names)
    return apart if listed.share_names(folders) else apart | dict.fromkeys(folders, "")


def units_of(file: str, split: str | None, split_key: str) -> list[Unit]:
    """The units of a file, without reading an image.

    Raises:
        UserError: it cannot be read, lacks a column, or has no splits where one is asked for.
    """
    return [unit for unit in _reader(file).units(file, split, split_key) if len(unit)]


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
    found = _reader(unit.path).rows(unit, inside, columns, roots)
    if columns is not None:  # what nobody asked for cannot make a row unusable
        found = [({name: row[name] for name in row if name in columns}, uid) for row, uid in found]
    return [normalise(row, uid) for row, uid in found]


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
    if _reader(unit.path) is not parquet or files.is_remote(unit.path):
        yield places, read_rows(unit, places, columns, roots)
        return
    inside = places if unit.rows is None else np.asarray(unit.rows)[places]
    done = 0
    for found in parquet.pieces(unit, inside, columns):
        yield places[done : done + len(found)], [normalise(row, uid) for row, uid in found]
        done += len(found)


def row_numbers(unit: Unit, places: np.ndarray) -> np.ndarray:
    """Numbers of rows in their file, from 0."""
    inside = places if unit.rows is None else np.asarray(unit.rows)[places]
    return inside + (parquet.first_row(unit) if _reader(unit.path) is parquet else unit.number)


def read_column(unit: Unit, column: str) -> list[Any]:
    """The values of one column, by its name in the file; empty where there is no such column."""
    return _reader(unit.path).column(unit, column)


def images_are_files(unit: Unit) -> bool:
    """Whether images lie beside the data file."""
    return _reader(unit.path) is listed


def _reader(file: str) -> Any:
    return READERS.get(files.pure(file).suffix, listed)

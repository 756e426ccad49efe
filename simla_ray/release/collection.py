"""A user's pictures: the files below a folder, or the rows of Parquet files and tars. Listed first, read as needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simla_ray.data.index import Index, build_index
from simla_ray.data.sources import images_are_files, read_pieces, row_numbers
from simla_ray.data.sources.described import IMAGES
from simla_ray.data.sources.files import is_remote, pure, stamp
from simla_ray.errors import UserError

#: What a picture is read as: its file, its bytes, or why there is none.
Encoded = Path | bytes | str | None


@dataclass(frozen=True)
class Entry:
    """A picture before it is read.

    ``name`` is unique in the collection: the path below the folder, or data file and row. ``size`` and ``mtime_ns`` are
    those of the file that holds it (a store may tell no time: 0); a change of either means that it must be read again.
    """

    name: str
    size: int
    mtime_ns: int


class Folder:
    """The image files below a folder, by their endings; what is hidden, and links to folders, are passed over."""

    def __init__(self, path: Path):
        self.path, self.entries = path, list(_files_below(path))

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, str, Encoded]]:
        """Place, name for a reader and picture of some entries, in their order."""
        for place in places:
            name = self.entries[place].name
            yield place, printable(name), self.path / name

    def file(self, name: str) -> Path | None:
        return self.path / name


class Rows:
    """The rows of Parquet files and tars."""

    def __init__(self, index: Index):
        self.index = index
        self.entries: list[Entry] = []
        known = {path: stamp(path) for path in dict.fromkeys(unit.path for unit in index.units)}
        for unit in index.units:
            for row in row_numbers(unit, np.arange(len(unit))).tolist():
                self.entries.append(Entry(f"{pure(unit.path).name}:{row}", *known[unit.path]))

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, str, Encoded]]:
        """Place, uid and picture of some entries, ascending; a row group on disk need not fit into memory."""
        wanted = np.asarray(places, dtype=np.int64)
        for unit, inside, where in self.index.locate(wanted):
            start = int(wanted[where[0]] - inside[0])
            for at, rows in read_pieces(unit, inside, ("uid", "image"), self.index.roots):
                for place, row in zip(at.tolist(), rows, strict=True):
                    yield start + place, printable(row["uid"]), row["image"]

    def file(self, name: str) -> Path | None:
        """A row has no file of its own."""
        return None


def open_collection(source: Path | str) -> Folder | Rows:
    """The pictures of a folder; without any, those of the Parquet files and tars in it, or of a file or URI.

    Raises:
        UserError: there is no picture.
    """
    path = Path(source)
    if not is_remote(str(source)) and path.is_dir():
        folder = Folder(path.absolute())
        if folder.entries:
            return folder
    index = build_index([str(source)], None, [], "pictures")
    for unit in index.units:
        if images_are_files(unit):
            raise UserError(
                f"{unit.path}: a list of pictures; give their folder, or a Parquet file or tar that holds them"
            )
    paths = {unit.path for unit in index.units}
    if len({pure(path).name for path in paths}) < len(paths):
        raise UserError(f"{source}: holds files of one name in several folders; index them one by one")
    return Rows(index)


def printable(name: str) -> str:
    """A name that a terminal can show: file names may hold bytes that are no text, and signs that move the cursor."""
    return "".join(sign if sign.isprintable() else "?" for sign in name)


def _files_below(path: Path) -> Iterator[Entry]:
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or name.rpartition(".")[2].lower() not in IMAGES:
                continue
            file = Path(folder) / name
            try:
                stat = file.stat()
            except OSError:  # gone since, or a link to nothing
                continue
            yield Entry(file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns)

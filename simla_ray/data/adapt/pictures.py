"""Where the pictures of an adaptation come from: a folder, by their names, or a data set, by uid and image_id."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from simla_ray.data.adapt.gathered import Record
from simla_ray.data.convert.rows import present
from simla_ray.data.convert.survey import rows_between
from simla_ray.data.index import build_index
from simla_ray.data.sources import read_pieces
from simla_ray.data.sources.described import IMAGES
from simla_ray.data.sources.files import named
from simla_ray.data.sources.listed import image_files, within_roots
from simla_ray.errors import UserError

#: Columns that come along from a data set of pictures.
CARRIED = ("split", "source", "license")
MISSING, AMBIGUOUS = "image_missing", "image_ambiguous"

#: A record, its pictures (bytes, a file, or the reason why there is none), and what else their row says.
Found = tuple[Record, list[bytes | Path | str], dict[str, Any]]


class FolderPictures:
    """Pictures by the path that the annotations name, else by its last part, anywhere in the folder; nothing outside.

    | reason | |
    |---|---|
    | image_missing | no file of the name |
    | image_ambiguous | several in different folders, and the annotations' path leads to none of them |
    | image_outside_roots | the path leads out of the folder, and no file of the name is in it |
    """

    columns: tuple[str, ...] = ()

    def __init__(self, folder: Path):
        self.folder = folder

    def of(self, records: Iterable[Record]) -> Iterator[Found]:
        for record in records:
            yield record, [self._find(names) for names in record.images], {}

    def _find(self, names: tuple[str, ...]) -> Path | str:
        reasons = []
        for name in names:
            found = within_roots(name, [self.folder])
            if isinstance(found, Path):
                return found
            reasons.append(found)
        for name in names:
            # Lists name folders of the machine that they were made on.
            alike = self._by_name.get(PurePosixPath(name).name, [])
            if len(alike) == 1:
                return within_roots(alike[0], [self.folder])
            if alike:
                return AMBIGUOUS
        return next((reason for reason in reasons if reason != MISSING), MISSING)

    @functools.cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in image_files(self.folder):
            name = PurePosixPath(path)
            for key in dict.fromkeys((name.name, name.stem)):
                found.setdefault(key, []).append(path)
        return found


class SetPictures:
    """Pictures of a data set, in its order; a picture is that of the first row with the uid or image_id.

    It is looked for by the names that the annotations have, then without folders and endings, on either side, and then
    by the annotations' image_id. ``image_ambiguous``: only folders and endings tell several pictures apart.

    Raises:
        UserError: the set cannot be read, or pairs are asked of it.
    """

    def __init__(self, uri: str):
        self.index = build_index([uri], None, [], "--images", "--split")
        _, row = next(rows_between(self.index, 0, 1))
        self.columns = tuple(name for name in CARRIED if name in present(row))

    def of(self, records: Iterable[Record]) -> Iterator[Found]:
        wanted: dict[int, list[Record]] = {}
        for record in records:
            if len(record.images) > 1:
                raise UserError("--images: pairs of pictures are read from a folder, not from a data set")
            found = self._find(record)
            if isinstance(found, str):
                yield record, [found], {}
            else:
                wanted.setdefault(found, []).append(record)
        columns = ("uid", "image", *self.columns)
        ordinals = np.array(sorted(wanted), np.int64)
        for unit, places, where in self.index.locate(ordinals):
            at = iter(ordinals[where].tolist())
            for _, rows in read_pieces(unit, places, columns, self.index.roots):
                for row in rows:
                    for record in wanted[next(at)]:
                        yield record, [row["image"]], {name: row.get(name) for name in self.columns}

    def _find(self, record: Record) -> int | str:
        """The ordinal of the row, or the reason why there is none."""
        (names,) = record.images
        exact, loose = self._ordinals
        for name in names:
            if name in exact:
                return exact[name]
        for name in names:
            for key in _loosely(name):
                if key in loose:
                    ordinal = loose[key]
                    return ordinal if ordinal is not None else AMBIGUOUS
        return exact.get(record.columns.get("image_id", ""), MISSING)

    @functools.cached_property
    def _ordinals(self) -> tuple[dict[str, int], dict[str, int | None]]:
        """By uid and image_id, and by these without folders and endings; None where that means several pictures."""
        exact: dict[str, int] = {}
        loose: dict[str, int | None] = {}
        first: dict[str, int] = {}  # rows of one image_id show one picture
        for place, row in rows_between(self.index, 0, len(self.index), ("uid", "image_id")):
            picture = first.setdefault(str(row["image_id"]), place.ordinal)
            for name in dict.fromkeys((str(row["uid"]), str(row["image_id"]))):
                exact.setdefault(name, place.ordinal)
                for key in _loosely(name):
                    if loose.setdefault(key, picture) != picture:
                        loose[key] = None
        return exact, loose


def _loosely(name: str) -> list[str]:
    """A name without its folders, and without the ending of a picture."""
    base = PurePosixPath(name).name
    stem, _, ending = base.rpartition(".")
    return [base, stem] if stem and ending.lower() in IMAGES else [base]


def pictures_in(where: str) -> FolderPictures | SetPictures:
    """Pictures of a folder, or of a data set by its URI; a folder of Parquet files is a data set.

    Raises:
        UserError: there is no such thing.
    """
    path = Path(where)
    if path.is_dir() and not any(path.glob("*.parquet")):
        return FolderPictures(path)
    if named(where)[0] is None and "://" not in where and not path.exists():
        raise UserError(f"--images: {where} does not exist; give the folder of the pictures, or a Parquet data set")
    return SetPictures(where)

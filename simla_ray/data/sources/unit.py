"""What is read: files, and the parts of them that are read together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataFile:
    """A file of a data set, by its absolute path or its URI in a store, and the name of its format."""

    path: str
    format: str


@dataclass(frozen=True)
class Unit:
    """Rows that are read together: a row group of a Parquet file, a stretch of a tar, of a list or of a folder.

    ``rows`` are the places in the unit that the split filter keeps; None keeps all ``n``.
    """

    path: str
    number: int
    n: int
    rows: tuple[int, ...] | None = None
    start: int = 0  # of a tar: where the stretch begins and ends, bytes
    stop: int = 0
    cut: bool = False  # its tar breaks off here
    format: str = ""
    name: str = ""  # what its rows that bring no uid are called after, see ``names``

    def __len__(self) -> int:
        return self.n if self.rows is None else len(self.rows)

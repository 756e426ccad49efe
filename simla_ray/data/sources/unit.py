"""What is read together."""

from __future__ import annotations

from dataclasses import dataclass

from simla_ray.data.sources.files import pure


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

    def __len__(self) -> int:
        return self.n if self.rows is None else len(self.rows)


def numbered(path: str, row: int) -> str:
    """Uid of a row that brings none: folder and name of the file tell shards of one name apart."""
    return f"{pure(path).parent.name}/{pure(path).stem}:{row}"

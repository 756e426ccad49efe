"""Dense ordinals: every row of a data set has a number 0..N-1, from counts alone (Parquet footers, JSON lengths)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simla_ray.data.sources import Unit, list_files, names_of, units_of
from simla_ray.data.sources.files import pure, size
from simla_ray.errors import UserError


@dataclass(frozen=True)
class Index:
    """The units of a data set in a fixed order; ordinal = rows before the unit + place in the unit."""

    units: tuple[Unit, ...]
    roots: tuple[str, ...] = ()
    per_uri: tuple[int, ...] = ()  # units of each URI

    def __len__(self) -> int:
        return sum(len(u) for u in self.units)

    def locate(self, ordinals: np.ndarray) -> list[tuple[Unit, np.ndarray, np.ndarray]]:
        """Group ordinals by unit: (unit, places in the unit, positions in ``ordinals``), each unit once."""
        ends = np.cumsum([len(u) for u in self.units])
        unit_of = np.searchsorted(ends, ordinals, side="right")
        groups = []
        for u in np.unique(unit_of):
            where = np.flatnonzero(unit_of == u)
            groups.append((self.units[u], ordinals[where] - (ends[u] - len(self.units[u])), where))
        return groups

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, resized or regrouped,
        or the split filter keeps other rows.
        """
        digest = hashlib.sha256()
        sizes = {path: size(path) for path in dict.fromkeys(unit.path for unit in self.units)}
        for unit in self.units:
            digest.update(repr((pure(unit.path).name, sizes[unit.path], unit.number, unit.n, unit.rows)).encode())
        return digest.hexdigest()[:16]


def build_index(
    uris: Sequence[str], split: str | None, roots: Sequence[Path], key: str, split_key: str | None = None
) -> Index:
    """Index the files behind ``uris``.

    Args:
        key: what errors call the URIs, and ``split_key`` the split; by default key_split.

    Raises:
        UserError: missing files, missing columns, or no row at all; names the key.
    """
    split_key = split_key or f"{key}_split"
    files = [list_files(uri, key) for uri in uris]
    names = names_of(list(dict.fromkeys(file for of_uri in files for file in of_uri)))
    found = [[u for file in of_uri for u in units_of(file, names[file], split, split_key)] for of_uri in files]
    units = [u for of_uri in found for u in of_uri]
    if not units:
        kept = f" with split {split}" if split is not None else ""
        raise UserError(f"{key}: {', '.join(uris)} holds no row{kept}")
    return Index(tuple(units), tuple(str(r.absolute()) for r in roots), tuple(len(of_uri) for of_uri in found))


def repeats(values: np.ndarray) -> np.ndarray:
    """Ascending positions of what stands earlier, too: of uids by ordinal, or hashes of them, the rows that repeat one.

    Args:
        values: (n,) of anything that can be sorted.
    """
    _, first = np.unique(values, return_index=True)
    again = np.ones(len(values), bool)
    again[first] = False
    return np.flatnonzero(again)

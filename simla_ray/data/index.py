"""Dense ordinals: every row of a data set has a number 0..N-1, from counts alone (Parquet footers, JSON lengths)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from simla_ray.data.draws import stable_hash
from simla_ray.data.sources import Unit, list_files, names_of, units_of
from simla_ray.data.sources.files import pure, size
from simla_ray.errors import UserError


@dataclass(frozen=True)
class Index:
    """The units of a data set in a fixed order; ordinal = rows before the unit + place in the unit."""

    units: tuple[Unit, ...]
    roots: tuple[str, ...] = ()
    per_uri: tuple[int, ...] = ()  # units of each URI
    left_out: int = 0  # rows that ``share_of`` left out

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


def share_of(index: Index, fraction: float) -> Index:
    """The index with round(``fraction`` * rows) of the rows of each URI.

    Every row has a number drawn from the name of its file and its place there, and the smallest are kept: the same rows
    in every run, and those of a smaller share are among those of a larger one. Units without a row fall out.
    """
    units: list[Unit] = []
    per_uri, end = [], 0
    for n in index.per_uri:
        own = _share(index.units[end : end + n], fraction)
        units += own
        per_uri.append(len(own))
        end += n
    found = replace(index, units=tuple(units), per_uri=tuple(per_uri))
    return replace(found, left_out=len(index) - len(found))


def _share(units: Sequence[Unit], fraction: float) -> list[Unit]:
    if not units:
        return []
    rows = [np.arange(unit.n) if unit.rows is None else np.array(unit.rows) for unit in units]
    drawn = np.concatenate([_drawn(unit)[places] for unit, places in zip(units, rows, strict=True)])
    kept = np.zeros(len(drawn), bool)
    kept[np.argsort(drawn, kind="stable")[: round(fraction * len(drawn))]] = True
    parts = np.split(kept, np.cumsum([len(places) for places in rows])[:-1])
    chosen = [tuple(places[part].tolist()) for places, part in zip(rows, parts, strict=True)]
    return [replace(unit, rows=places) for unit, places in zip(units, chosen, strict=True) if places]


def _drawn(unit: Unit) -> np.ndarray:
    """(n,) numbers of the rows of a unit, whether its split keeps them or not."""
    name = unit.name or pure(unit.path).name
    return np.random.default_rng(stable_hash(f"{name}#{unit.number}")).random(unit.n)


def repeats(values: np.ndarray) -> np.ndarray:
    """Ascending positions of what stands earlier, too: of uids by ordinal, or hashes of them, the rows that repeat one.

    Args:
        values: (n,) of anything that can be sorted.
    """
    _, first = np.unique(values, return_index=True)
    again = np.ones(len(values), bool)
    again[first] = False
    return np.flatnonzero(again)

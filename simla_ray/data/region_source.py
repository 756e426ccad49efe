"""Where the regions of a run come from: decided once, by what its rows have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simla_ray.config.load import to_dict, validated
from simla_ray.config.schema import RegionSource, Run
from simla_ray.data.index import Index
from simla_ray.data.regions import COLUMNS
from simla_ray.data.schema import OF_REGIONS
from simla_ray.data.sources import Unit, read_rows
from simla_ray.errors import UserError

LOOKED_AT = 20


def with_regions(run: Run, indexes: Mapping[str, Index] | None) -> Run:
    """The run with ``regions.source`` decided, column, boxes or grid, and the width of a column's features.

    Args:
        indexes: of train, val and test; None for the built-in world, whose rows have boxes of all objects.

    Raises:
        UserError: a URI has no rows with what ``regions.source`` names, or features of several widths; or the config
            does not go with what was decided.
    """
    if run.regions is None:
        return run
    rows = {name: first_rows(index, OF_REGIONS) for name, index in (indexes or {}).items()}

    def has(name: str, source: RegionSource) -> bool:
        columns = COLUMNS[source]
        return all(any(all(row.get(c) is not None for c in columns) for row in of_uri) for of_uri in rows[name])

    if run.regions.source is not RegionSource.auto:
        source = run.regions.source
    elif indexes is None:
        source = RegionSource.boxes
    else:
        source = next(s for s in COLUMNS if s is RegionSource.grid or all(has(name, s) for name in rows))
    for name in rows:
        if not has(name, source):
            wanted = " and ".join(COLUMNS[source])
            raise UserError(f"data.{name}: no {wanted} in the first rows, which regions.source={source} reads")
    width = run.regions.width
    if source is RegionSource.column:
        if indexes is None:
            raise UserError("regions.source: column, but rows of the built-in world have no region_feats")
        every = (row for of_set in rows.values() for of_uri in of_set for row in of_uri)
        widths = {len(f) for row in every for f in (row.get("region_feats") or ())[:1]}
        width = width or next(iter(widths), None)
        if widths != {width}:
            raise UserError(
                f"regions.width: {width}, but region_feats have {', '.join(map(str, sorted(widths)))} numbers"
            )
    decided = run.regions.model_copy(update={"source": source, "width": width})
    return validated(to_dict(run.model_copy(update={"regions": decided})))


def first_units(index: Index) -> list[Unit]:
    """The first unit of each URI of a set."""
    starts = [sum(index.per_uri[:i]) for i, n in enumerate(index.per_uri) if n] or [0]
    return [index.units[i] for i in starts]


def first_rows(index: Index, columns: Sequence[str]) -> list[list[dict]]:
    """The first rows of each URI of a set, with these columns; no image is read."""
    units = first_units(index)
    return [read_rows(u, np.arange(min(LOOKED_AT, len(u))), ("uid", *columns), index.roots) for u in units]

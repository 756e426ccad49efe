"""Where the regions of a run come from: decided once, by what its rows have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simla_ray.config.schema import RegionSource, Run
from simla_ray.data.index import Index
from simla_ray.data.regions import COLUMNS
from simla_ray.data.schema import OF_REGIONS
from simla_ray.data.sources import read_rows
from simla_ray.errors import UserError

LOOKED_AT = 20


def with_regions(run: Run, indexes: Mapping[str, Index] | None) -> Run:
    """The run with ``regions.source`` decided, column, boxes or grid, and the width of a column's features.

    Args:
        indexes: of train, val and test; None for the built-in world, whose rows have boxes of all objects.

    Raises:
        UserError: a set has no rows with what ``regions.source`` names, or features of several widths.
    """
    if run.regions is None:
        return run
    rows = {name: first_rows(index) for name, index in (indexes or {}).items()}

    def has(name: str, source: RegionSource) -> bool:
        return any(all(row.get(column) is not None for column in COLUMNS[source]) for row in rows[name])

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
        widths = {len(f) for name in rows for row in rows[name] for f in (row.get("region_feats") or ())[:1]}
        width = width or next(iter(widths), None)
        if widths != {width}:
            raise UserError(
                f"regions.width: {width}, but region_feats have {', '.join(map(str, sorted(widths)))} numbers"
            )
    decided = run.regions.model_copy(update={"source": source, "width": width})
    return run.model_copy(update={"regions": decided})


def first_rows(index: Index) -> list[dict]:
    """The first rows of a set, with what regions are made of; no image is read."""
    unit = index.units[0]
    return read_rows(unit, np.arange(min(LOOKED_AT, len(unit))), ("uid", *OF_REGIONS), index.roots)

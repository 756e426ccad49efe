"""Whether rows have the column that a run reads its phrase concepts from."""

from __future__ import annotations

from collections.abc import Mapping

from simla_ray.config.schema import Run
from simla_ray.data.concept_tokens import COLUMN, concept_columns
from simla_ray.data.index import Index
from simla_ray.data.region_source import first_rows, first_units
from simla_ray.errors import UserError


def check_phrases(run: Run, indexes: Mapping[str, Index]) -> None:
    """Look for ``concepts.source=column`` in the first rows of each URI. A row without phrases has no concepts; a set
    without the column would be read as if its captions said nothing.

    Args:
        indexes: by the key or option that names their files.

    Raises:
        UserError: a URI has no such column, or nothing in it.
    """
    if not concept_columns(run):
        return
    for key, index in indexes.items():
        for unit, rows in zip(first_units(index), first_rows(index, (COLUMN,)), strict=True):
            if all(row.get(COLUMN) is None for row in rows):
                raise UserError(
                    f"{key}: no {COLUMN} in the first rows of {unit.path}, which concepts.source=column reads; "
                    f"give files that have them, or train with concepts.source=rules"
                )

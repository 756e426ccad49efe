"""Where the tags of a run come from: decided once, by what its rows have."""

from __future__ import annotations

from collections.abc import Mapping

from simla_ray.config.load import to_dict, validated
from simla_ray.config.schema import Run, TagSource
from simla_ray.data.index import Index
from simla_ray.data.region_source import first_rows
from simla_ray.data.tags import COLUMNS
from simla_ray.errors import UserError


def with_tags(run: Run, indexes: Mapping[str, Index] | None) -> Run:
    """The run with ``tags.source`` decided: column, box_labels or none. Without tags there is nothing to recover, and
    MCR is off.

    A source must be in every set: what is trained with tags is not tested without them.

    Args:
        indexes: of train, val and test; None for the built-in world, whose rows have labels of all objects.

    Raises:
        UserError: a URI has no rows with what ``tags.source`` names, or the config does not go with what was decided.
    """
    if run.tags is None:
        return run
    source = run.tags.source
    rows = {name: first_rows(index, tuple(COLUMNS.values())) for name, index in (indexes or {}).items()}

    def lacking(column: str) -> list[str]:
        if indexes is None:
            return [] if column == COLUMNS[TagSource.box_labels] else ["train"]
        return [n for n in rows if any(all(row.get(column) is None for row in of_uri) for of_uri in rows[n])]

    if source is TagSource.auto:
        source = next((s for s, column in COLUMNS.items() if not lacking(column)), TagSource.none)
    elif source in COLUMNS and (sets := lacking(COLUMNS[source])):
        raise UserError(f"data.{sets[0]}: no {COLUMNS[source]} in the first rows, which tags.source={source} reads")
    update: dict[str, object] = {"tags": run.tags.model_copy(update={"source": source})}
    if source is TagSource.none and run.objectives.mcr is not None:
        update["objectives"] = run.objectives.model_copy(update={"mcr": None})
        if set(run.objectives.active()) == {"mcr"}:
            raise UserError("objectives.mcr: is all that is on, but the rows have no tags to recover")
    return validated(to_dict(run.model_copy(update=update)))

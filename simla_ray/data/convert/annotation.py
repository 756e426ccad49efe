"""What a conversion adds to its rows when a higher floor hands it in: this one knows no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa

from simla_ray.data.convert.survey import Survey
from simla_ray.data.schema import OPTIONAL
from simla_ray.errors import UserError


class Added(NamedTuple):
    """New values of a row, by column, and what of it is counted in the manifest."""

    columns: dict[str, Any]
    counts: dict[str, int]


#: Rows as they are written in; out, for each, what is added to it, or the reason why it is dropped.
Annotate = Callable[[list[dict[str, Any]]], list[Added | str]]


@dataclass(frozen=True)
class Annotation:
    """What is added, and on what it depends.

    Attributes:
        settings: what must be equal for a conversion to go on, by the names of the options.
        columns: the columns that are written, with their types.
        new: those of them that no row may have yet.
        make: called once in each process that writes, with whatever it loads.
        loads_model: whether that is worth actors, and GPUs where there are some.
        row_bytes: what it adds to a row, about.
        about: of the manifest.
    """

    settings: Mapping[str, Any]
    columns: Mapping[str, pa.DataType]
    new: tuple[str, ...]
    make: Callable[[], Annotate]
    loads_model: bool
    row_bytes: int
    about: Mapping[str, Any]

    def widened(self, found: Survey) -> Survey:
        """The survey of the rows with what is added to them.

        Raises:
            UserError: they have it already.
        """
        for name in self.new:
            if name in found.columns:
                raise UserError(f"--with: rows of the source have {name} already; annotate rows without")
        columns = tuple(name for name in OPTIONAL if name in found.columns or name in self.columns)
        return replace(found, columns=columns, row_bytes=found.row_bytes + self.row_bytes)

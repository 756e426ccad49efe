"""One shard, written by one task: row group by row group under another name, then renamed, then reported."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simla_ray.data.convert.annotation import Annotate, Annotation
from simla_ray.data.convert.plan import MB, STATE, Options, Plan
from simla_ray.data.convert.rows import encoded_bytes, pictures_of, schema_of, values_of
from simla_ray.data.convert.survey import Place, rows_between
from simla_ray.data.decode import DropRow
from simla_ray.data.index import Index
from simla_ray.data.sources.parquet import singles
from simla_ray.errors import UserError
from simla_ray.whole import write_whole

NO_LICENSE = "not stated"
#: Columns whose values come again and again.
REPEATING = ("split", "source", "license")


class WriteShards:
    """Map function: numbers of shards in, the same out when each is on disk."""

    def __init__(self, index: Index, plan: Plan, options: Options, folder: Path, annotation: Annotation | None = None):
        self.index, self.plan, self.options, self.folder = index, plan, options, folder
        self.annotation = annotation
        self.schema = schema_of(plan.columns, annotation.columns if annotation is not None else None)
        self.duplicates = frozenset(plan.duplicates)

    @cached_property
    def _annotate(self) -> Annotate:
        """Made where the rows are, once in a process."""
        assert self.annotation is not None
        return self.annotation.make()

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for number in batch["shard"].tolist():
            name = self.plan.names[number]
            try:
                self._write(name, self.plan.cuts[number], self.plan.cuts[number + 1])
            except OSError as error:
                raise UserError(f"{self.folder / name}: cannot be written ({error.strerror or error})") from None
            yield {"shard": np.array([number])}

    def _write(self, name: str, start: int, stop: int) -> None:
        state, report = self.folder / STATE, Report(name)

        def groups() -> Iterator[list[dict[str, Any]]]:
            for rows in self._row_groups(start, stop, report):
                yield rows
                (state / f"{name}.at").write_text(str(report.rows_in))

        write_shard(self.folder, report, self.schema, groups())
        # Last: a shard without its report is written again.
        write_whole(state / f"{name}.json", report.to_json())

    def _row_groups(self, start: int, stop: int, report: Report) -> Iterator[list[dict[str, Any]]]:
        group: list[tuple[Place, dict[str, Any]]] = []
        size, added = 0, self.annotation.row_bytes if self.annotation is not None else 0
        for place, row in rows_between(self.index, start, stop):
            report.rows_in += 1
            try:
                written = self._row(place, row)
            except DropRow as drop:
                report.drop(place, row["uid"], drop.reason)
                continue
            size += encoded_bytes(written) + sum(len(c or "") for c in written["captions"]) + added
            group.append((place, written))
            if size >= self.options.row_group_mb * MB:
                yield from self._finished(group, report)
                group, size = [], 0
        if group:
            yield from self._finished(group, report)

    def _finished(self, group: list[tuple[Place, dict[str, Any]]], report: Report) -> Iterator[list[dict[str, Any]]]:
        """The rows of a group with what is added to them, if any are left."""
        rows = [row for _, row in group]
        if self.annotation is not None:
            found, rows = self._annotate(rows), []
            for (place, row), added in zip(group, found, strict=True):
                if isinstance(added, str):
                    report.drop(place, row["uid"], added)
                    continue
                report.added.update(added.counts)
                rows.append(row | added.columns)
        for row in rows:
            report.keep(row)
        if rows:
            yield rows

    def _row(self, place: Place, row: dict[str, Any]) -> dict[str, Any]:
        if place.ordinal in self.duplicates:
            raise DropRow("uid_duplicate")
        pictures = pictures_of(row, self.options.max_pixels, self.options.max_px)
        return values_of(row) | pictures


def write_shard(folder: Path, report: Report, schema: pa.Schema, groups: Iterable[list[dict[str, Any]]]) -> None:
    """Write the shard that ``report`` names, a row group for each list of rows; note its bytes and their hash there."""
    # Of its own: a task that outlived its killed driver may still be writing this shard.
    temporary = folder / f".{report.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with temporary.open("wb") as file:
            with pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                use_dictionary=[c for c in REPEATING if c in schema.names],
                write_statistics=["uid"],
            ) as writer:
                singly = pa.schema([field.with_type(singles(field.type)) for field in schema])
                for rows in groups:
                    writer.write_table(pa.Table.from_pylist(rows, schema=singly).cast(schema))
            file.flush()
            os.fsync(file.fileno())
        report.bytes = temporary.stat().st_size
        with temporary.open("rb") as file:
            report.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        temporary.replace(folder / report.name)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Report:
    """What became of the rows of a shard."""

    name: str
    rows_in: int = 0
    rows: int = 0
    bytes: int = 0
    sha256: str = ""
    licenses: Counter[str] = field(default_factory=Counter)
    added: Counter[str] = field(default_factory=Counter)
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def drop(self, place: Place, uid: str, reason: str) -> None:
        self.dropped.append({"uid": uid, "reason": reason, "file": place.file, "row": place.number})

    def keep(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.licenses[row.get("license") or NO_LICENSE] += 1

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @classmethod
    def read(cls, folder: Path, name: str) -> Report | None:
        """The report of a shard that is on disk as a whole."""
        try:
            found = cls(**json.loads((folder / STATE / f"{name}.json").read_text()))
            if (folder / name).stat().st_size != found.bytes:
                return None
        except (OSError, ValueError, TypeError):
            return None
        found.licenses, found.added = Counter(found.licenses), Counter(found.added)
        return found

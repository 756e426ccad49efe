"""Every row read and every picture decoded: what cannot be used, uids that come twice, pictures in both sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simla_ray.data.convert.jobs import join, run_job
from simla_ray.data.convert.look import look, near
from simla_ray.data.convert.progress import Progress, Say, aligned
from simla_ray.data.convert.rows import digest, picture_of, pixel_digest, values_of
from simla_ray.data.convert.statistics import Statistics
from simla_ray.data.convert.survey import DIGEST, Place, as_digests, rows_between, stretches
from simla_ray.data.decode import DropRow
from simla_ray.data.index import Index, build_index, repeats
from simla_ray.data.schema import StandIn

#: Rows of each finding that are named, its count has all of them; fewer where naming one means reading it again.
NAMED, NAMED_AGAIN = 100, 24
#: Rows of each finding that the terminal names.
PRINTED = 3
BLANK = bytes(DIGEST.itemsize)


@dataclass(frozen=True)
class Example:
    """A row with a finding. ``other``: the row that it repeats."""

    uid: str
    place: Place
    other: Example | None = None


@dataclass
class Finding:
    """A reason, how often it was found, and the first of its rows."""

    n: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, example: Example) -> None:
        self.n += 1
        if len(self.examples) < NAMED:
            self.examples.append(example)


@dataclass
class Checked:
    """One set: its rows by ordinal, in digests, and what they are like. Unusable rows have blank digests of pictures.

    ``own_uids`` are blank for rows that bring none.
    """

    index: Index
    statistics: Statistics
    reasons: dict[str, Finding]
    own_uids: np.ndarray
    pixels: np.ndarray
    looks: np.ndarray

    @property
    def pictures(self) -> int:
        """Different pictures of the usable rows."""
        return len(np.unique(self.pixels[_seen(self.pixels)]))


@dataclass
class Result:
    """What both sets have: ``same`` pictures, pictures that look ``alike``, rows with uids of their own (``uids``)."""

    sets: dict[str, Checked]
    uris: dict[str, Sequence[str]]
    same: Finding
    alike: Finding
    uids: Finding

    @property
    def found(self) -> bool:
        """Whether anything is wrong; what only looks alike, or may be numbered alike, is for people to judge."""
        return bool(self.same.n or any(checked.reasons for checked in self.sets.values()))


def check(
    sets: Mapping[str, tuple[Sequence[str], str | None]],
    roots: Sequence[str],
    max_pixels: int,
    tasks: int | None,
    address: str | None,
    say: Say,
) -> Result:
    """Check the sets ``train`` and, if there is one, ``val``.

    Args:
        sets: URIs and split filter by name.
        tasks: how many run at the same time; None: as many as there are CPUs.

    Raises:
        UserError: a source cannot be read at all.
    """
    keys = {"train": ("source", "--split"), "val": ("--val", "--val-split")}
    folders = [Path(r) for r in roots]
    indexes = {name: build_index(uris, split, folders, *keys[name]) for name, (uris, split) in sets.items()}
    for name, index in indexes.items():
        say(f"{name:<11}{', '.join(sets[name][0])}: {len(index):,} rows")
    tasks = join(address, tasks)
    checked = {name: _check(index, max_pixels, tasks, say) for name, index in indexes.items()}
    same, alike, uids = _shared(checked) if "val" in checked else (Finding(), Finding(), Finding())
    return Result(checked, {name: uris for name, (uris, _) in sets.items()}, same, alike, uids)


def findings_table(result: Result) -> str:
    """Findings with their counts and first rows, for the terminal."""
    lines = [["finding", "set", "rows", "first of them (uid, row of the file from 0)"]]
    for name, checked in result.sets.items():
        lines += [
            [reason, name, f"{finding.n:,}", _first(finding)]
            for reason, finding in sorted(checked.reasons.items(), key=lambda item: -item[1].n)
        ]
    if result.same.n:
        lines.append(["picture_in_both", "train, val", f"{result.same.n:,}", _first(result.same)])
    for name, finding in (("(looks alike)", result.alike), ("(uid in both)", result.uids)):
        if finding.n:
            lines.append([name, "train, val", f"{finding.n:,}", _first(finding)])
    usable = [
        f"{name:<11}{checked.statistics.usable:,} of {checked.statistics.rows:,} rows can be used, "
        f"{checked.pictures:,} different pictures"
        for name, checked in result.sets.items()
    ]
    table = aligned(lines, right=(2,)) if len(lines) > 1 else "no finding"
    return "\n".join([table, "", *usable])


def rows_of(index: Index, ordinals: Iterable[int]) -> list[tuple[Place, dict[str, Any]]]:
    """Single rows with their places, in the order asked for."""
    return [next(rows_between(index, ordinal, ordinal + 1)) for ordinal in ordinals]


def _first(finding: Finding) -> str:
    named = [_named(example) for example in finding.examples[:PRINTED]]
    return "; ".join(named) + ("; ..." if finding.n > PRINTED else "")


def _named(example: Example) -> str:
    text = f"{example.uid} ({Path(example.place.file).name} {example.place.number})"
    return text if example.other is None else f"{text} = {_named(example.other)}"


def _check(index: Index, max_pixels: int, tasks: int, say: Say) -> Checked:
    items = [{"start": start, "stop": stop} for start, stop in stretches(index)]
    total, reasons, done = Statistics(), dict[str, Finding](), [0]
    parts: list[list[bytes]] = [[], [], [], []]
    with Progress(len(index), 0, lambda: done[0], say):
        for block in run_job(items, _Decode(index, max_pixels), tasks):
            for text in block["stretch"].tolist():
                part = json.loads(text)
                total.merge(Statistics.from_json(part["statistics"]))
                for column, encoded in zip(parts, part["digests"], strict=True):
                    column.append(bytes.fromhex(encoded))
                for reason, uid, place in part["unusable"]:
                    reasons.setdefault(reason, Finding()).add(Example(uid, Place(*place)))
                done[0] = total.rows
    uids, own_uids, pixels, looks = (as_digests(b"".join(column)) for column in parts)
    twice = _twice(index, uids)
    if twice.n:
        reasons["uid_duplicate"] = twice
    return Checked(index, total, reasons, own_uids, pixels, looks)


class _Decode:
    """Map function: stretches of ordinals in, a JSON object of each out."""

    def __init__(self, index: Index, max_pixels: int):
        self.index, self.max_pixels = index, max_pixels

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
            statistics = Statistics()
            digests: list[list[bytes]] = [[], [], [], []]
            unusable = []
            for place, row in rows_between(self.index, start, stop):
                statistics.rows += 1
                pixels = looks = BLANK
                try:
                    picture = picture_of(row, self.max_pixels)
                    values_of(row)
                    statistics.add(row, picture)
                    pixels, looks = pixel_digest(picture.image), look(picture.image)
                except DropRow as drop:
                    unusable.append((drop.reason, row["uid"], (place.ordinal, place.file, place.number)))
                uid = digest(row["uid"])
                own = BLANK if isinstance(row["uid"], StandIn) else uid
                for column, value in zip(digests, (uid, own, pixels, looks), strict=True):
                    column.append(value)
            text = json.dumps(
                {
                    "statistics": statistics.to_json(),
                    "digests": [b"".join(column).hex() for column in digests],
                    "unusable": unusable,
                }
            )
            yield {"stretch": np.array([text], object)}


def _twice(index: Index, uids: np.ndarray) -> Finding:
    """Rows whose uid an earlier row has, each with the first one."""
    again = repeats(uids)
    values, first = np.unique(uids, return_index=True)
    named = again[:NAMED_AGAIN]
    firsts = first[np.searchsorted(values, uids[named])]
    return Finding(
        len(again), [_example(index, int(i), _example(index, int(j))) for i, j in zip(named, firsts, strict=True)]
    )


def _shared(checked: Mapping[str, Checked]) -> tuple[Finding, Finding, Finding]:
    """Rows of the validation set whose pictures are, or look, as one of the training set, and whose uids are there."""
    train, val = checked["train"], checked["val"]
    pairs = near(train.looks, val.looks)
    pairs = pairs[train.pixels[pairs[:, 0]] != val.pixels[pairs[:, 1]]]
    return (
        _pairs(train, val, *_equal(train.pixels, val.pixels)),
        _pairs(train, val, pairs[:, 0], pairs[:, 1]),
        _pairs(train, val, *_equal(train.own_uids, val.own_uids)),
    )


def _equal(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of digests that both have: the first among ours, and every one among theirs."""
    values, first = np.unique(ours, return_index=True)
    where = np.minimum(np.searchsorted(values, theirs), len(values) - 1)
    equal = np.flatnonzero((values[where] == theirs) & _seen(theirs))
    return first[where[equal]], equal


def _pairs(train: Checked, val: Checked, ours: np.ndarray, theirs: np.ndarray) -> Finding:
    pairs = list(zip(ours.tolist(), theirs.tolist(), strict=True))
    return Finding(len(pairs), [_example(train.index, i, _example(val.index, j)) for i, j in pairs[:NAMED_AGAIN]])


def _example(index: Index, ordinal: int, other: Example | None = None) -> Example:
    place, row = next(rows_between(index, ordinal, ordinal + 1, ("uid",)))
    return Example(row["uid"], place, other)


def _seen(digests: np.ndarray) -> np.ndarray:
    return digests != b""

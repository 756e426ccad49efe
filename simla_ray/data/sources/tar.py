"""Webdataset's tars: neighbours with one name up to the first dot are one sample.

A unit is a stretch of neighbours. Nothing but images, texts and JSON is looked at: what else a tar holds, pickles among
it, stays closed.
"""

from __future__ import annotations

import functools
import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np

from simla_ray.data.sources import files
from simla_ray.data.sources.described import IMAGES, WORDS, described
from simla_ray.data.sources.unit import DataFile, Unit
from simla_ray.errors import UserError

UNIT_ROWS = 256
BLOCK = 512
BUFFER = 2**20


@dataclass
class Sample:
    """One name's members; ``ending -> content``."""

    key: str
    start: int
    members: dict[str, bytes | None] = field(default_factory=dict)


def units(file: DataFile, split: str | None, split_key: str) -> list[Unit]:
    """From the headers alone: the contents are passed over."""
    if split is not None:
        raise UserError(f"{split_key}: {split}, but {file.path} is a tar and has no split column")
    return _units(file.path, files.size(file.path))


@functools.lru_cache(maxsize=4096)
def _units(file: str, size: int) -> list[Unit]:
    """Kept, for a start looks at its data more than once; ``size`` tells another file of the name."""
    samples, end, cut = files.retried(file, lambda: _scanned(file, size))
    if not any(ending in IMAGES for s in samples for ending in s.members):
        raise UserError(f"{file}: no image in this tar; looked for {', '.join(IMAGES)}")
    starts = [s.start for s in samples] + [end]
    found = []
    for i in range(0, len(samples), UNIT_ROWS):
        stop = min(i + UNIT_ROWS, len(samples))
        found.append(Unit(file, i, stop - i, None, starts[i], starts[stop], cut and stop == len(samples)))
    return found


def rows(
    unit: Unit, inside: np.ndarray, columns: Sequence[str] | None, roots: Sequence[str]
) -> list[tuple[dict[str, Any], str]]:
    """The rows with their own uids' stand-ins: names of the tar and of the sample."""
    stretch = files.retried(unit.path, lambda: _read(unit))
    with _opened(io.BytesIO(stretch), unit.path) as tar:
        samples = list(_samples(tar, (*IMAGES, *WORDS)))
    if len(samples) != unit.n:
        raise UserError(f"{unit.path}: changed while it was in use")
    found = []
    for i in inside.tolist():
        row = _row(samples[i])
        if unit.cut and i == unit.n - 1:
            row["image"] = "tar_truncated"
        found.append((row, f"{unit.name}/{samples[i].key}"))
    return found


def column(unit: Unit, name: str) -> list[Any]:
    """See ``read_column``; from the samples' JSON alone. Of a store nothing: its pictures would all come along."""
    if files.is_remote(unit.path):
        return []
    values = []
    with files.opened(unit.path) as file:
        file.seek(unit.start)
        with _opened(file, unit.path) as tar:
            for sample in itertools.islice(_samples(tar, ("json",)), unit.n):
                content = sample.members.get("json")
                values.append(described("json", content, name).get(name) if content is not None else None)
    return values


def _scanned(path: str, size: int) -> tuple[list[Sample], int, bool]:
    """Samples, where they end, and whether the tar breaks off there."""
    with files.opened(path) as opened:
        # Buffered: a store would answer a request for every header.
        file = cast(BinaryIO, io.BufferedReader(opened, BUFFER)) if files.is_remote(path) else opened
        with _opened(file, path) as tar:
            samples = list(_samples(tar))
            end = min(tar.offset, size)  # a header may promise any number of bytes
        # A tar ends with a block of zeros; where it does not, nobody knows whether its last sample is whole.
        file.seek(end)
        return samples, end, file.read(BLOCK) != bytes(BLOCK)


def _read(unit: Unit) -> bytes:
    with files.opened(unit.path) as file:
        file.seek(unit.start)
        return file.read(unit.stop - unit.start)


def _opened(file: BinaryIO, path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except OSError:
        raise
    except Exception as error:  # see _next
        raise UserError(f"{path}: not a readable tar ({error})") from None


def _samples(tar: tarfile.TarFile, contents: Sequence[str] = ()) -> Iterator[Sample]:
    """Samples up to where the tar ends or is cut, and what is in members of these endings, None where it is cut."""
    sample = None
    while (member := _next(tar)) is not None:
        if not member.isfile() or member.issparse():  # a sparse one may be of any size, whatever the tar's is
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = Sample(key, member.offset)
        ending = ending.lower()
        if ending not in (*IMAGES, *WORDS):
            continue
        sample.members[ending] = _content(tar, member) if ending in contents else None
    if sample is not None:
        yield sample


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; None where the tar ends, or what is left is no tar."""
    try:
        member = tar.next()
    except OSError:
        raise
    except Exception:  # of broken headers tarfile raises more than its own errors
        return None
    if member is not None and (member.size < 0 or tar.offset <= member.offset):  # this way tarfile would read for ever
        tar.offset = member.offset
        return None
    return member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    try:
        stream = tar.extractfile(member)
        return stream.read() if stream is not None else None
    except OSError:
        raise
    except Exception:  # the tar ends inside; or see _next
        return None


def _row(sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {}
    image = next((ending for ending in IMAGES if ending in sample.members), None)
    for ending in reversed([e for e in WORDS if e in sample.members]):  # JSON's columns win
        content = sample.members[ending]
        row |= described(ending, content) if content is not None else {"image": "tar_truncated"}
    if "image" not in row:
        row["image"] = sample.members[image] or b"" if image is not None else None
    return row

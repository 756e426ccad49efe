"""Where data files are: on disk, or in a store that pyarrow reaches (s3://, gs://).

A file is named by a string: an absolute path, or a URI, of which what follows a ``?`` are options of pyarrow's file
system (``endpoint_override``, ``region``, ``scheme``).
"""

from __future__ import annotations

import fnmatch
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from pyarrow import fs

from simla_ray.errors import UserError

#: Seconds between the attempts to read from a store; a throttled one needs more than a moment.
PAUSES_S = (0.5, 2.0, 8.0)

#: A format named before a URI; what is before a ``://`` is where the URI leads to.
FORMAT = re.compile(r"([A-Za-z]\w*):(?!//)(.*)", re.DOTALL)

T = TypeVar("T")


def is_remote(uri: str) -> bool:
    return "://" in uri


def named(uri: str) -> tuple[str | None, str]:
    """The format named before a URI (``tar:s3://bucket/shards``), if there is one, and the URI."""
    found = FORMAT.fullmatch(uri)
    return (found[1], found[2]) if found else (None, uri)


def absolute(uri: str) -> str:
    """The URI as workers elsewhere understand it."""
    format, where = named(uri)
    where = where if is_remote(where) else str(Path(where).absolute())
    return where if format is None else f"{format}:{where}"


def pure(uri: str) -> PurePosixPath:
    """Names and endings of a URI."""
    return PurePosixPath(uri.partition("?")[0] if is_remote(uri) else uri)


def listed(uri: str) -> list[str]:
    """Files in a store behind a URI: the file itself, those of a folder, those that a pattern fits; sorted.

    Raises:
        UserError: the store cannot be reached or refuses.
    """
    system, path = _located(uri)
    head, _, options = uri.partition("?")
    root = head[: len(head) - len(path)]
    try:
        if any(c in path for c in "*["):
            folder = str(PurePosixPath(*_before_pattern(PurePosixPath(path).parts)))
            found = system.get_file_info(fs.FileSelector(folder, recursive=True))
            names = [info.path for info in found if info.is_file and fnmatch.fnmatchcase(info.path, path)]
        else:
            info = system.get_file_info(path)
            if info.type is fs.FileType.Directory:
                found = system.get_file_info(fs.FileSelector(path))
                names = [info.path for info in found if info.is_file]
            else:
                names = [path] if info.is_file else []
    except OSError as error:
        raise UserError(f"{uri}: cannot be listed ({_line(error)})") from None
    return [root + name + (f"?{options}" if options else "") for name in sorted(names)]


def opened(uri: str) -> BinaryIO:
    """The file, open for reading; also pyarrow's are closed by ``with``."""
    if not is_remote(uri):
        return Path(uri).open("rb")
    system, path = _located(uri)
    return system.open_input_file(path)


def size(uri: str) -> int:
    """Bytes."""
    return stamp(uri)[0]


def stamp(uri: str) -> tuple[int, int]:
    """Bytes, and when they were last written, ns since 1970; 0 where a store does not tell."""
    if not is_remote(uri):
        local = Path(uri).stat()
        return local.st_size, local.st_mtime_ns
    system, path = _located(uri)
    info = retried(uri, lambda: system.get_file_info(path))
    return info.size, info.mtime_ns or 0


def retried(uri: str, read: Callable[[], T]) -> T:
    """What ``read`` gives; a store that fails is asked again, a disk is not.

    Raises:
        UserError: it still fails after the last pause.
    """
    pauses = PAUSES_S if is_remote(uri) else ()
    for pause in pauses:
        try:
            return read()
        except OSError:
            time.sleep(pause)
    try:
        return read()
    except OSError as error:
        tried = f" after {len(pauses) + 1} attempts" if pauses else ""
        raise UserError(f"{uri}: cannot be read{tried} ({_line(error)})") from None


def _located(uri: str) -> tuple[fs.FileSystem, str]:
    head, _, options = uri.partition("?")
    scheme, _, path = head.partition("://")
    return _system(scheme, path.partition("/")[0], options), path.rstrip("/")


@functools.lru_cache(maxsize=16)
def _system(scheme: str, bucket: str, options: str) -> fs.FileSystem:
    try:
        system, _ = fs.FileSystem.from_uri(f"{scheme}://{bucket}" + (f"?{options}" if options else ""))
    except (OSError, ValueError) as error:
        raise UserError(f"{scheme}://{bucket}: no such store ({_line(error)})") from None
    return system


def _before_pattern(parts: tuple[str, ...]) -> tuple[str, ...]:
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*["))
    return parts[:first]


def _line(error: Any) -> str:
    return str(error).splitlines()[0][:200]

"""What a process can see of the machine it runs on; in the driver, and as a Ray task on every node. Judges nothing."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import estimate_available_memory, resolve_object_store_memory

import simla_ray
from simla_ray.data.sources import files
from simla_ray.errors import UserError

ABSENT = "absent"


@dataclass(frozen=True)
class File:
    """A file or folder that must be readable; ``size`` in bytes where the driver knows it."""

    key: str
    path: str
    size: int | None = None


@dataclass(frozen=True)
class Questions:
    """``marker``: a folder in the storage, in which the file ``driver`` holds ``token``, or why not: ``problem``."""

    marker: Path
    token: str
    files: tuple[File, ...]
    packages: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class Answers:
    """What ``look`` saw; a reason is empty where nothing is wrong.

    Args:
        cores: CPUs that this process may use.
        memory: free bytes, also within the limit of a container.
        ray_temp_used: share of the disk of Ray's folder, which takes spilled objects, that is full.
        storage_problem: why the marker could not be read or answered.
    """

    packages: dict[str, str]
    cores: int
    memory: int
    ray_temp_used: float
    storage_problem: str = ""
    unreadable: tuple[tuple[File, str], ...] = ()


def look(questions: Questions, me: str) -> Answers:
    """Look around, and answer the marker with a file named ``me``."""
    used = shutil.disk_usage(existing(_ray_temp()))
    unread = [(file, _unreadable(file)) for file in questions.files]
    return Answers(
        packages=_environment(questions.packages),
        cores=len(os.sched_getaffinity(0)),
        memory=estimate_available_memory(),
        ray_temp_used=1 - used.free / used.total,
        storage_problem=_answer(questions, me),
        unreadable=tuple((file, reason) for file, reason in unread if reason),
    )


def clock() -> float:
    """Seconds since 1970, of this machine."""
    return time.time()


def existing(path: Path) -> Path:
    """The path, or the nearest one above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def default_object_store() -> int:
    """Bytes of the object store that a Ray of its own would get on this machine."""
    return resolve_object_store_memory(estimate_available_memory())


def short(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


def _answer(questions: Questions, me: str) -> str:
    if questions.problem:
        return questions.problem
    try:
        if (questions.marker / "driver").read_text() != questions.token:
            return "another folder of that name"
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return short(error)
    try:
        (questions.marker / me).write_text(questions.token)
    except OSError as error:
        return f"not writable: {short(error)}"
    return ""


def _unreadable(file: File) -> str:
    path = Path(file.path)
    try:
        if not files.is_remote(file.path) and path.is_dir():
            with os.scandir(path) as entries:
                next(entries, None)
        elif files.is_remote(file.path):
            files.retried(file.path, lambda: _first_byte(file.path))
        else:
            _first_byte(file.path)
        size = files.size(file.path)
    except (OSError, UserError) as error:
        return short(error)
    if file.size is not None and size != file.size:
        return f"{size} bytes in place of {file.size}"
    return ""


def _first_byte(path: str) -> None:
    with files.opened(path) as opened:
        opened.read(1)


def _environment(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and packages; simla_ray's with a digest of its code, which may differ under one version."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found | {"simla_ray": f"{simla_ray.__version__} (code {_code_digest()})"}


def _code_digest() -> str:
    digest, root = hashlib.sha256(), Path(simla_ray.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _ray_temp() -> Path:
    return Path(ray.get_runtime_context().get_temp_dir() if ray.is_initialized() else get_default_ray_temp_dir())

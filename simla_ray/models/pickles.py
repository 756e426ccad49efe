"""Reads what ``torch.save`` wrote and runs nothing of it.

Unpickling makes records only. Every class and function that the file names, tensors' own included, becomes an inert
``Stub`` that notes what it was called with; so a config object, a scheduler or a stranger's command comes out as a
record of itself. Tensors are made from such records afterwards, checked against the bytes that are there, and only
those that are asked for: an optimiser in the file costs nothing. (``torch.load(weights_only=True)`` refuses a file
with anything foreign in it, as the official ones are.)

Both layouts of ``torch.save`` are read: the zip archive and the older sequence of pickles.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from simla_ray.errors import UserError

#: The first two pickles of a file in the older layout.
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
#: Where a checkpoint keeps its weights, beside a plain dict of tensors.
STATE_KEYS = ("model", "state_dict")
DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip
TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETER = "torch._utils._rebuild_parameter"


class Stub:
    """Stands in for an object of the file: takes whatever the pickle gives it, does nothing.

    ``origin`` is its class or function as the file names it; ``state`` what was to become its attributes.
    """

    __slots__ = ("args", "items", "state")
    origin: ClassVar[str] = ""
    args: tuple[Any, ...]
    items: list[Any]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Stub:
        stub = super().__new__(cls)
        stub.args, stub.state, stub.items = args, None, []
        return stub

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    add = append

    def __call__(self, *args: Any, **_: Any) -> Stub:
        return Stub(self, *args)

    def __repr__(self) -> str:
        return f"<{self.origin or 'call'}, not read>"


@dataclass(frozen=True)
class Storage:
    """A storage by its key in the file, nothing read yet."""

    dtype: torch.dtype
    key: str
    numel: int


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Makes stubs of everything that is not a plain value or an ordered dict.

    No pickle can reach anything else: names are looked up here and nowhere, and only what was looked up can be called.
    This is the unpickler in Python, whose memo is a dict: a number in a file could have that in C allocate 64 GB.
    """

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.kinds: dict[str, type[Stub]] = {}
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        origin = f"{module}.{name}"
        if origin == "collections.OrderedDict":
            return OrderedDict
        if origin not in self.kinds:
            self.kinds[origin] = type("Stub", (Stub,), {"__slots__": (), "origin": origin})
        return self.kinds[origin]

    def persistent_load(self, pid: Any) -> Any:
        """("storage", type, key, device, numel, ...); the older layout also names modules with their source."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]
        _, kind, key, _, numel = pid[:5]
        if any(view is not None for view in pid[5:]):
            raise UserError("its storages are views of each other, as of a very old torch; save it again")
        storage = Storage(DTYPES[kind.origin], str(key), int(numel))
        return self.storages.setdefault(storage.key, storage)

    @property
    def foreign(self) -> list[str]:
        """What the file names beside tensors and plain values."""
        return sorted(n for n in self.kinds if n not in DTYPES and n not in (*TENSORS, PARAMETER))


@dataclass(frozen=True)
class Archive:
    """An opened file: ``root`` is what was saved, with records for tensors and stubs for foreign objects.

    ``foreign`` are the names of their classes and functions.
    """

    root: Any
    foreign: list[str]
    read: Callable[[Storage], bytes]

    def tensor(self, record: Any) -> Tensor:
        """The tensor of a record, contiguous, with memory of its own."""
        if record.origin == PARAMETER:
            record = record.args[0]
        storage, offset, size, stride = record.args[:4]
        numel = math.prod(size)
        if not 0 <= numel <= storage.numel or min((*size, *stride, offset), default=0) < 0:
            raise ValueError(f"a tensor of shape {size} in a storage of {storage.numel}")
        if not numel:
            return torch.empty(size, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(self.read(storage)), dtype=storage.dtype, count=storage.numel)
        inside = flat.as_strided(size, stride, offset)  # raises where it would not be
        return inside.clone(memory_format=torch.contiguous_format)

    def state(self) -> tuple[dict[str, Tensor], list[str]]:
        """The weights of a checkpoint, and the names of entries beside them that are no tensors.

        They are the file's own dict, or the one under ``STATE_KEYS``.
        """
        found = self.root
        if isinstance(found, Mapping):
            found = next((found[k] for k in STATE_KEYS if isinstance(found.get(k), Mapping)), found)
        if not isinstance(found, Mapping) or not any(is_tensor(v) for v in found.values()):
            raise UserError("it holds no dict of tensors")
        tensors = {str(name): self.tensor(value) for name, value in found.items() if is_tensor(value)}
        return tensors, [str(name) for name, value in found.items() if not is_tensor(value)]


def is_tensor(value: Any) -> bool:
    """Whether an object of an archive is the record of a tensor or parameter."""
    if not isinstance(value, Stub):
        return False
    if value.origin == PARAMETER:
        return bool(value.args) and is_tensor(value.args[0])
    return value.origin in TENSORS and len(value.args) >= 4 and isinstance(value.args[0], Storage)


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Open a file that ``torch.save`` wrote.

    Raises:
        UserError: one line; it cannot be read, or is not such a file. Errors of the caller's own block that a hostile
            file can cause are turned into the same line.
    """
    try:
        with path.open("rb") as file:
            yield _archive(file)
    except UserError as error:
        raise UserError(f"{path}: no checkpoint that can be read ({error})") from None
    except Exception as error:  # a damaged or hostile file can make anything of the unpickler raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UserError(f"{path}: no checkpoint that can be read ({reason})") from None


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a ``.pth`` file, and what else was in it, by the names of the classes.

    Raises:
        UserError: it is no checkpoint, or holds entries among its weights that are no tensors.
    """
    with opened(path) as archive:
        tensors, others = archive.state()
        if others:
            raise UserError(f"among its weights {len(others)} are no tensors: {', '.join(others[:3])}")
        return tensors, archive.foreign


def _archive(file: BinaryIO) -> Archive:
    if zipfile.is_zipfile(file):
        return _zip_archive(zipfile.ZipFile(file))
    file.seek(0)
    return _legacy_archive(file)


def _zip_archive(archive: zipfile.ZipFile) -> Archive:
    """``<name>/data.pkl``, ``<name>/byteorder``, and a file ``<name>/data/<key>`` per storage, none compressed."""
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UserError("a zip archive, but not of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names:
        raise UserError("a TorchScript archive; save its state_dict")

    def read(name: str) -> bytes:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise UserError("a compressed archive")
        return archive.read(name)

    if f"{folder}byteorder" in names and read(f"{folder}byteorder") != b"little":
        raise UserError("written on a big-endian machine")
    with archive.open(pickles[0]) as file:
        unpickler = Unpickler(file)
        root = unpickler.load()
    cached = lru_cache(1)(lambda storage: read(f"{folder}data/{storage.key}"))
    return Archive(root, unpickler.foreign, cached)


def _legacy_archive(file: BinaryIO) -> Archive:
    """Pickles of a magic number, a protocol, the machine, the object and its storages' keys; then the storages."""
    if Unpickler(file).load() != LEGACY_MAGIC or Unpickler(file).load() != LEGACY_PROTOCOL:
        raise UserError("not a file of torch.save")
    if Unpickler(file).load().get("little_endian") is not True:
        raise UserError("written on a big-endian machine")
    unpickler = Unpickler(file)
    root = unpickler.load()
    places: dict[str, tuple[int, int]] = {}
    for key in Unpickler(file).load():
        size = struct.unpack("<q", file.read(8))[0] * unpickler.storages[key].dtype.itemsize
        places[key] = file.tell(), size
        file.seek(size, 1)

    @lru_cache(1)
    def read(storage: Storage) -> bytes:
        start, size = places[storage.key]
        file.seek(start)
        return file.read(size)

    return Archive(root, unpickler.foreign, read)

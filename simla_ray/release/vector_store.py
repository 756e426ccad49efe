"""Vectors of pictures on disk: safetensors, and a JSON that says whose they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch

from simla_ray.data.schema import utf8
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_tensors, save_tensors
from simla_ray.whole import write_whole

NAMES = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """A picture that was looked at: what its file was like then, what a reader calls it (``label``), and its row among
    the vectors, or the reason why it has none.
    """

    name: str
    size: int
    mtime_ns: int
    label: str
    reason: str | None = None
    row: int | None = None


class VectorStore:
    """The folder of one collection under one model; others of either lie beside it.

    Args:
        where: the collection's path or URI.
        model: fingerprint of what the vectors depend on.
    """

    def __init__(self, cache: Path, where: str, model: str):
        # A folder's name may be no UTF-8, and then safetensors reads nothing below a folder of that name.
        key = hashlib.sha256(f"{model} {where}".encode(errors="surrogateescape")).hexdigest()[:12]
        self.folder = cache / f"{utf8(Path(where).name) or 'pictures'}-{key}"
        self.about = {"format": FORMAT, "source": where, "model": model}

    def load(self, say: Callable[[str], None]) -> tuple[dict[str, Record], np.ndarray]:
        """Records by name, and their vectors (n, E) float32; nothing where there is none yet.

        An index that is damaged is built again, and said to be.
        """
        nothing: tuple[dict[str, Record], np.ndarray] = {}, np.zeros((0, 0), np.float32)
        try:
            stored = json.loads((self.folder / NAMES).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return nothing
        except (OSError, ValueError, RecursionError) as error:
            say(f"note       {self.folder / NAMES} cannot be read ({error}); the index is built again")
            return nothing
        try:
            if {key: stored[key] for key in self.about} != self.about:
                raise ValueError("another collection's or model's")
            vectors = load_tensors(self.folder / str(stored["vectors"]))["vectors"].numpy()
            records, row = {}, 0
            for name, size, mtime_ns, label, reason in stored["pictures"]:
                records[name] = Record(name, size, mtime_ns, label, reason, row if reason is None else None)
                row += reason is None
            if vectors.shape[:1] != (row,):
                raise ValueError(f"{len(vectors)} vectors for {row} pictures")
        except (UserError, ValueError, KeyError, TypeError) as error:
            say(f"note       {self.folder} does not hold together ({error}); the index is built again")
            return nothing
        return records, vectors

    def save(self, records: list[Record], vectors: np.ndarray) -> None:
        """Write records, those without a reason in the order of vectors (n, E). A reader finds the old or the new one.

        Raises:
            UserError: the folder cannot be written.
        """
        pictures = json.dumps([astuple(record)[:5] for record in records])
        # The JSON names its file of vectors, and is put in place last.
        own = f"vectors-{hashlib.sha256(pictures.encode() + vectors.tobytes()).hexdigest()[:12]}.safetensors"
        self.prepare()
        try:
            save_tensors({"vectors": torch.from_numpy(vectors)}, self.folder / own)
            # safetensors writes files that nobody else may read.
            (self.folder / own).chmod(self.folder.stat().st_mode & 0o666)
            about = json.dumps({**self.about, "vectors": own})
            write_whole(self.folder / NAMES, f'{about[:-1]}, "pictures": {pictures}}}')
            for old in self.folder.glob("vectors-*.safetensors"):
                if old.name != own:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise self._refused(error) from None

    def prepare(self) -> None:
        """Make the folder, so that a mistake shows before the work is done.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: cannot be written ({error.strerror or error}); see --index")

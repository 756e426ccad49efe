"""A checkpoint folder: weights, teacher, queue, optimiser, state, config, vocabulary and codes, with checksums.

model.safetensors   student, heads, temperature, the teacher's float32 master, the queue
optimizer.safetensors   AdamW's moments, ``<moment>.<parameter name>``
state.json          step, cursor, best step
config.yaml         the resolved run
prepared/           vocabulary and codes
manifest.json       sha256 of every file, written last: without it the folder is not a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from simla_ray.config.load import to_yaml
from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_strict, load_tensors, save_tensors
from simla_ray.models.model import Model
from simla_ray.training.optim import named_parameters
from simla_ray.training.state import State

#: A folder that begins so is still being written, or was when its process ended.
UNFINISHED = ".unfinished-"


class Snapshot:
    """What a checkpoint will hold, copied out of the way of the next step.

    Its buffers, on the host and pinned for a model on a GPU, are used again and touched when they are made: a copy into
    fresh pages takes twice the time.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer):
        self.buffers: dict[str, torch.Tensor] = {}
        self.taken: dict[str, torch.Tensor] = {}
        self.state = self.config = ""
        for name, value in _tensors(model, optimizer):
            self._buffer(name, value)

    def take(self, run: Run, model: Model, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Copy everything; this is what the step waits for."""
        self.taken = {n: self._buffer(n, t).copy_(t, non_blocking=True) for n, t in _tensors(model, optimizer)}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.state, self.config = json.dumps(state.to_json()), to_yaml(run)

    def write(self, folder: Path, prepared: Path) -> None:
        """Write a complete checkpoint; under its name it is there as a whole or not at all.

        Raises:
            OSError: it could not be written; nothing of it is left.
        """
        unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            for part in ("model", "optimizer"):
                of_part = {n.removeprefix(f"{part}."): t for n, t in self.taken.items() if n.startswith(f"{part}.")}
                save_tensors(of_part, unfinished / f"{part}.safetensors")
            (unfinished / "state.json").write_text(self.state)
            (unfinished / "config.yaml").write_text(self.config)
            shutil.copytree(prepared, unfinished / "prepared")
            (unfinished / "manifest.json").write_text(json.dumps(dict(_checksums(unfinished)), indent=1))
            for path in [*unfinished.rglob("*"), unfinished]:
                _sync(path)
            unfinished.rename(folder)
            _sync(folder.parent)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != like.shape:
            buffer = torch.zeros(like.shape, dtype=like.dtype)
            self.buffers[name] = buffer.pin_memory() if like.is_cuda else buffer
        return self.buffers[name]


def _tensors(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model_tensors(model).items():
        yield f"model.{name}", value
    for name, parameter in named_parameters(model):
        for moment, value in optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{moment}.{name}", value


def load_checkpoint(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> State:
    """Bring model and optimiser to where the checkpoint was made.

    Args:
        folder: as ``find_checkpoint`` gives it, its checksums verified.

    Raises:
        UserError: it does not fit this run.
    """
    load_weights(folder, model)
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_tensors(folder / "optimizer.safetensors").items():
        moment, _, name = key.partition(".")
        moments.setdefault(name, {})[moment] = value
    for name, parameter in named_parameters(model):
        if name in moments:
            # Cloned out of the file's buffer: vector kernels round differently on memory that is not aligned.
            optimizer.state[parameter] = {m: t.clone().to(parameter.device) for m, t in moments[name].items()}
    return load_state(folder)


def load_state(folder: Path) -> State:
    """Where the run stood."""
    return State.from_json(json.loads((folder / "state.json").read_text()))


def load_weights(folder: Path, model: Model) -> None:
    """Weights, teacher and queue only."""
    state = load_tensors(folder / "model.safetensors")
    if model.teacher is not None and model.teacher.low is not None:  # derived from the master, not stored
        prefix = "teacher.master."
        state |= {f"teacher.low.{n.removeprefix(prefix)}": t for n, t in state.items() if n.startswith(prefix)}
    load_strict(model, state, folder)


def model_tensors(model: Model) -> dict[str, torch.Tensor]:
    """The state that is stored: everything but the teacher's low-precision copy."""
    return {n: t for n, t in model.state_dict().items() if not n.startswith("teacher.low.")}


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: not a complete checkpoint (no readable manifest.json)") from None
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file() or _sha256(file) != expected:
            raise UserError(f"{file}: missing or damaged (its checksum is not the one in manifest.json)")


def find_checkpoint(checkpoints: Path, step: int | None = None) -> Path | None:
    """The complete checkpoint of that step, or the newest one; None where there is none.

    What lies on storage counts, whether or not Ray came to register it before a kill. A damaged folder is passed over.
    """
    return newest_and_damaged(checkpoints, step)[0]


def newest_and_damaged(checkpoints: Path, step: int | None = None) -> tuple[Path | None, list[Path]]:
    """As ``find_checkpoint``, and the folders that were passed over on the way because something in them is wrong."""
    steps: list[tuple[int, Path]] = []
    damaged = []
    for folder in sorted(checkpoints.glob("step-*")):
        try:
            steps.append((load_state(folder).step, folder))
        except (OSError, ValueError, KeyError, TypeError):
            damaged.append(folder)
    for at, candidate in sorted(steps, reverse=True):
        if step is not None and at != step:
            continue
        try:
            verify(candidate)
        except UserError:
            damaged.append(candidate)
            continue
        return candidate, damaged
    return None, damaged


def _checksums(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield str(file.relative_to(folder)), _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

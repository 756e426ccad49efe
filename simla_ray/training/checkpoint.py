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


def save_checkpoint(
    folder: Path, run: Run, model: Model, optimizer: torch.optim.Optimizer, state: State, prepared: Path
) -> None:
    """Write a complete checkpoint into an existing empty folder."""
    save_tensors(model_tensors(model), folder / "model.safetensors")
    moments = {}
    for name, parameter in named_parameters(model):
        for moment, value in optimizer.state.get(parameter, {}).items():
            moments[f"{moment}.{name}"] = value
    save_tensors(moments, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state.to_json()))
    (folder / "config.yaml").write_text(to_yaml(run))
    shutil.copytree(prepared, folder / "prepared")
    (folder / "manifest.json").write_text(json.dumps(dict(_checksums(folder)), indent=1))


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
    steps = {}
    for manifest in checkpoints.glob("*/manifest.json"):
        try:
            steps[json.loads((manifest.parent / "state.json").read_text())["step"]] = manifest.parent
        except (OSError, ValueError, KeyError):
            continue  # cut short while it was copied
    wanted = sorted(steps, reverse=True) if step is None else [s for s in steps if s == step]
    for candidate in wanted:
        try:
            verify(steps[candidate])
        except UserError:
            continue
        return steps[candidate]
    return None


def _checksums(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield str(file.relative_to(folder)), _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

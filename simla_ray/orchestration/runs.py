"""Run folders: finding them, naming new ones, opening the model that a run has trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from simla_ray.config.load import difference, load_run
from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.models.model import Model
from simla_ray.release.source import find_source, trained_model
from simla_ray.report.reference import CURVES_TOO
from simla_ray.training.checkpoint import find_checkpoint

#: What can lie under storage -> the file that it has from its start on.
CONFIGS = {"run": "config.yaml", "sweep": "sweep.yaml", "comparison": "comparison.yaml"}


def run_folder(run: Run) -> Path:
    """Absolute folder of a named run."""
    assert run.name is not None
    return run.storage.resolve() / run.name


def check_same_run(run: Run) -> None:
    """Refuse to go on with a named run under other ``identity`` keys, showing the difference."""
    folder = run_folder(run)
    check_kind(folder, "run")
    if not (folder / "config.yaml").exists():
        return
    changed = difference(load_run([folder / "config.yaml"], presets=False), run, "identity")
    if changed:
        lines = [f"{path}: the run has {was!r}, now {now!r}" for path, was, now in changed]
        raise UserError(
            f"{folder} was started with another config; give the run another --name, or undo:\n" + "\n".join(lines)
        )


def begun_run(run: Run) -> Run | None:
    """The stored config of a named run that has a checkpoint to go on from; None of any other."""
    if run.name is None:
        return None
    stored = run_folder(run) / "config.yaml"
    if not stored.exists() or find_checkpoint(run_folder(run) / "checkpoints") is None:
        return None
    return load_run([stored], presets=False)


def unlike_stored(run: Run) -> list[tuple[str, Any, Any]]:
    """Keys in which a named run is another experiment than the one that its folder holds: (path, stored, now)."""
    stored = run_folder(run) / "config.yaml"
    if not stored.exists():
        return []
    was = load_run([stored], presets=False)
    return difference(was, run, "identity") + [d for d in difference(was, run, "operational") if d[0] in CURVES_TOO]


def check_kind(folder: Path, kind: str) -> None:
    """Refuse a folder under storage that holds another kind of thing."""
    for other, file in CONFIGS.items():
        if other != kind and (folder / file).exists():
            raise UserError(f"name: {folder} holds a {other}, no {kind}; give the {kind} another --name")


def changed_keys(run: Run) -> dict[str, list[Any]]:
    """``operational`` keys of an interrupted run that are others now: path -> [before, now]."""
    stored = run_folder(run) / "config.yaml"
    if not stored.exists():
        return {}
    changed = difference(load_run([stored], presets=False), run, "operational")
    return {path: [was, now] for path, was, now in changed}


def fresh_name(run: Run) -> str:
    """``<label>-<number>``, the first number that is free under storage."""
    taken = [p.name for p in run.storage.glob(f"{run.label}-*")]
    numbers = [int(m[1]) for name in taken if (m := re.fullmatch(re.escape(run.label) + r"-(\d+)", name))]
    return f"{run.label}-{max(numbers, default=0) + 1:03d}"


def find_run(path: Path, storage: Path = Path("runs")) -> Path:
    """The folder of a run, or an exported one, by path or by name under storage.

    Raises:
        UserError: there is none; names the runs there are.
    """
    for candidate in (path, storage / path):
        if (candidate / "config.yaml").is_file():
            return candidate.resolve()
    there = sorted(p.parent.name for p in storage.glob("*/config.yaml"))
    raise UserError(f"{path}: no run there; under {storage} there are: {', '.join(there) or 'none'}")


def load_trained(path: Path, device: torch.device | None = None) -> tuple[Run, Model, Path]:
    """The best checkpoint of a run, or an exported folder: config, model in eval mode, folder of vocabulary and codes.

    Raises:
        UserError: none of them is there, or no complete checkpoint in it.
    """
    source = find_source(find_run(path))
    assert source.run is not None and source.prepared is not None
    model = trained_model(source.run, source.vocabulary(), source.read(), source.file)
    return source.run, model.to(device or torch.device("cpu")), source.prepared

"""A run, or an official file, as a folder that ``simla_ray.load`` opens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simla_ray.config.load import load_run
from simla_ray.data.text import build_vocabulary
from simla_ray.errors import UserError
from simla_ray.models.fit import IMAGE_POSITIONS, load_start, start_state
from simla_ray.orchestration.manifest import PACKAGES, versions
from simla_ray.orchestration.runs import find_run
from simla_ray.release.export import export, unfinished, write_folder
from simla_ray.release.source import Weights, empty_model, find_source, without_teacher

#: What an official file must hold for an objective to be on in the config it gets.
HEADS = {"itc": "student.text_proj.", "itm": "itm_head.", "mlm": "student.text.cls.", "psl": "student.concept_head."}


def export_run(path: Path, out: Path | None, storage: Path, *, teacher: bool, official: bool) -> Path:
    """Export a run's best checkpoint, to its folder ``export`` unless ``out`` says where. Returns the new folder.

    Raises:
        UserError: no such run, ``out`` is taken, or what is asked for is not there.
    """
    folder = find_run(path, storage)
    out = out if out is not None else folder / "export"
    export(find_source(folder), out, teacher=teacher, official=official)
    return out


def export_file(path: Path, out: Path, files: Sequence[Path], overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """Make an official file into a folder like those of runs. Returns it, and notes on what was changed or left out.

    The config is that of the method at paper size; ``files`` and ``overrides`` change it. Objectives whose heads the
    file lacks are off, and so is MIM, whose codes are not in the file; the picture's side is the one its positions fit.

    Raises:
        UserError: no official file, weights that do not fit, a vocabulary that cannot be read, or ``out`` is taken.
    """
    source = find_source(path)
    weights = source.read()
    derived = [f"{key}={value}" for key, value in _shape_of(weights).items()]
    run = load_run(files, [*derived, *overrides])
    vocabulary = build_vocabulary((), run.text)
    model = empty_model(without_teacher(run), len(vocabulary))
    notes = weights.notes + load_start(model, weights.tensors, source.name)
    manifest: dict[str, Any] = {"label": run.label, "packages": versions(PACKAGES)}
    facts = {"weights from": f"{path.name}, a file in the layout of the official code", "changed": "; ".join(notes)}
    with unfinished(out) as folder:
        write_folder(folder, run, start_state(model), vocabulary, manifest, {}, facts)
    return out, notes


def _shape_of(weights: Weights) -> dict[str, Any]:
    """What the config of an official file must be, as far as its tensors say."""
    if weights.layout is None:
        raise UserError("not an official file")
    config: dict[str, Any] = {
        "size": "base",
        "method": "albef" if weights.layout.token_types else "simla",
        "vision.pretrained": "false",
        "objectives.mim": "null",
    }
    for objective, head in HEADS.items():
        if not any(name.startswith(head) for name in weights.tensors):
            config[f"objectives.{objective}"] = "null"
    positions = weights.tensors.get(IMAGE_POSITIONS)
    patches = weights.tensors.get("student.vision.vit.patch_embed.proj.weight")
    if positions is not None and patches is not None:
        config["vision.image_px"] = math.isqrt(positions.shape[1] - 1) * patches.shape[-1]
        config["vision.patch_px"] = patches.shape[-1]
    return config

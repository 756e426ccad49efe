"""Writes trained weights as a folder that stands alone.

model.safetensors    towers, heads and temperature; no teacher, queue or optimiser
config.yaml          the run's config, without paths of the machine it ran on
tokenizer.json, word_frequency.json    the vocabulary
codes.safetensors    centroids of the visual codes, where the run has them: for training on from here
answers.json         the known answers, where the run was fine-tuned for questions
majority.json, text_only.*    a fine-tuned task's baselines
manifest.json        the run's manifest: data, licences, code, packages
README.md            the model card
official.safetensors on request, the same checkpoint under the names of the official code
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from simla_ray.config.enums import Fusion
from simla_ray.config.load import load_run, to_dict, to_yaml
from simla_ray.config.schema import Run
from simla_ray.data.sources.files import named
from simla_ray.data.text import Vocabulary
from simla_ray.errors import UserError
from simla_ray.evaluation.blind import FILES as BASELINES
from simla_ray.models.checkpoint_io import save_tensors
from simla_ray.models.official import ALBEF, SIMLA, to_official
from simla_ray.release.card import card
from simla_ray.release.source import CODES, CONFIG, WEIGHTS, WORD_LISTS, Source, Weights

OFFICIAL = "official.safetensors"
#: What of a run's manifest goes along.
MANIFEST = ("label", "git_sha", "packages", "data", "fallbacks", "licenses", "start")


def export(source: Source, out: Path, *, teacher: bool = False, official: bool = False) -> None:
    """Export a run, or a folder exported before.

    Args:
        teacher: the EMA towers in place of the student's; the ITM head, which has no copy, stays the student's.
        official: write ``official.safetensors`` too, with teacher and queue where they are there.

    Raises:
        UserError: ``out`` is taken, no teacher is there, or the official layout has no place for the weights.
    """
    assert source.run is not None
    weights = source.read()
    if teacher and not weights.has_teacher:
        raise UserError(f"--teacher: {source.name} has no EMA teacher")
    facts = {"towers": "EMA teacher's; the results below are the student's"} if teacher else {}
    with unfinished(out) as folder:
        if official:
            save_tensors(_official(source.run, weights), folder / OFFICIAL)
        for name in (CODES, *BASELINES):
            if source.prepared is not None and (source.prepared / name).is_file():
                shutil.copyfile(source.prepared / name, folder / name)
        write_folder(
            folder,
            source.run,
            tower_tensors(weights, teacher=teacher),
            source.vocabulary(),
            source.manifest(),
            source.summary(),
            facts,
        )


def write_folder(
    folder: Path,
    run: Run,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    manifest: Mapping[str, Any],
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Write weights, config, vocabulary, manifest and card into an existing folder."""
    save_tensors(tensors, folder / WEIGHTS)
    vocabulary.save(folder)
    portable = _portable(run, folder)
    (folder / CONFIG).write_text(to_yaml(portable))
    kept = portable_manifest(manifest)
    (folder / "manifest.json").write_text(json.dumps(kept, indent=1))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    n = sum(t.numel() for t in tensors.values())
    facts = {**facts, "weights": f"{n / 1e6:.2f} M numbers, sha256 of {WEIGHTS} {_sha256(folder / WEIGHTS)}"}
    (folder / "README.md").write_text(card(portable, kept, summary, facts))


def tower_tensors(weights: Weights, *, teacher: bool) -> dict[str, Tensor]:
    """Towers, heads and temperature; of the towers the student's or the teacher's."""
    kept = {n: t for n, t in weights.tensors.items() if not n.startswith(("teacher.", "queue."))}
    if teacher:
        prefix = "teacher.master."
        copies = {n.removeprefix(prefix): t for n, t in weights.tensors.items() if n.startswith(prefix)}
        kept |= {f"student.{name}": tensor for name, tensor in copies.items()}
    return kept


def portable_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a manifest that are not about one machine, with names in place of absolute paths."""
    return {key: _without_paths(manifest[key]) for key in MANIFEST if manifest.get(key)}


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` in one piece at the end, or leaves nothing.

    Raises:
        UserError: ``out`` is there already.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or give another folder")
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        folder.mkdir(parents=True)
        yield folder
        for file in folder.iterdir():  # safetensors writes files that nobody else may read
            file.chmod(folder.stat().st_mode & 0o666)
        folder.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _official(run: Run, weights: Weights) -> dict[str, Tensor]:
    if run.text.fusion in (Fusion.merged, Fusion.two_stage):
        raise UserError(f"--layout: official is that of SIMLA or ALBEF; text.fusion={run.text.fusion} has none there")
    layout = ALBEF if run.text.fusion is Fusion.upper_half else SIMLA
    try:
        return to_official(weights.tensors, layout)
    except UserError as error:
        raise UserError(f"--layout: {error}; it knows vision.stem=patch and temperature.kind=divide") from None


def _portable(run: Run, folder: Path) -> Run:
    """The config without paths of this machine; word lists that it names are copied into the folder."""
    changes: dict[str, Any] = {"storage": "runs", "init_from": None, "data.image_roots": []}
    psl = run.objectives.psl
    for key, source in {
        "objectives.psl.stop_words": psl.stop_words if psl else None,
        "objectives.psl.vocab": psl.vocab if psl else None,
    }.items():
        if source not in (None, "en") and Path(source).is_file():
            shutil.copyfile(source, folder / WORD_LISTS[key])
            changes[key] = WORD_LISTS[key]
    tree = _without_paths(to_dict(run))
    return load_run(overrides={**tree, **changes}, presets=False)


def _without_paths(value: Any) -> Any:
    """Absolute paths in a tree become names."""
    if isinstance(value, dict):
        return {key: _without_paths(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    format, path = named(value)
    if not Path(path).is_absolute():
        return value
    return Path(path).name if format is None else f"{format}:{Path(path).name}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

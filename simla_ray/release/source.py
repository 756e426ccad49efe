"""Where trained weights are read from: a run's folder, a checkpoint, an exported folder, an official file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simla_ray.config.load import load_run, read_yaml
from simla_ray.config.schema import Run
from simla_ray.data.text import Vocabulary
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_strict, load_tensors
from simla_ray.models.model import Model
from simla_ray.models.official import Layout, from_official
from simla_ray.models.official_uniter import from_official_uniter, is_uniter
from simla_ray.models.pickles import read_state
from simla_ray.training.checkpoint import find_checkpoint

WEIGHTS, CONFIG, CODES = "model.safetensors", "config.yaml", "codes.safetensors"
#: Word lists that an exported folder brings along: key of the config -> file.
WORD_LISTS = {"objectives.psl.stop_words": "stop_words.txt", "objectives.psl.vocab": "keyword_vocabulary.txt"}


@dataclass(frozen=True)
class Weights:
    """Tensors under our names; ``notes`` say what the file holds beside them. ``layout`` is an official file's."""

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    layout: Layout | None = None

    @property
    def has_teacher(self) -> bool:
        return any(name.startswith("teacher.") for name in self.tensors)


@dataclass(frozen=True)
class Source:
    """Trained weights on disk, found but not read.

    ``run`` and ``prepared``, the folder of vocabulary and codes, are None for an official file, which has neither.
    ``about`` is the folder of a run's manifest and summary, where there is one; the summary is that of the run's best
    checkpoint, which a checkpoint named by itself need not be.
    """

    name: str
    file: Path
    run: Run | None = None
    prepared: Path | None = None
    about: Path | None = None
    by_itself: bool = False

    def read(self) -> Weights:
        """Read the weights.

        Raises:
            UserError: the file is damaged, or none of ours and none of the official ones.
        """
        if self.run is not None:
            return Weights(load_tensors(self.file))
        return _read_official(self.file)

    def vocabulary(self) -> Vocabulary:
        assert self.prepared is not None
        return Vocabulary.load(self.prepared)

    def manifest(self) -> dict[str, Any]:
        """Empty where it is not there."""
        return self._json("manifest.json")

    def summary(self) -> dict[str, Any]:
        """Of a finished run; else empty."""
        return {} if self.by_itself else self._json("summary.json")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.about / name if self.about is not None else None
        return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def find_source(path: Path) -> Source:
    """Find the weights that a path stands for: a run's best checkpoint, a checkpoint, an exported folder, a file.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return Source(path.name, path)
    folder = path.resolve()
    if not (folder / CONFIG).is_file():
        raise UserError(f"{path}: no file, and no folder of a run or an export (no {CONFIG} in it)")
    if not (folder / WEIGHTS).is_file():
        best = best_checkpoint(folder)
        return Source(folder.name, best / WEIGHTS, _config(best), best / "prepared", folder)
    if (folder / "prepared").is_dir():
        run_folder = folder.parents[1]
        about = run_folder if (run_folder / CONFIG).is_file() else None
        return Source(folder.name, folder / WEIGHTS, _config(folder), folder / "prepared", about, by_itself=True)
    return Source(folder.name, folder / WEIGHTS, _config(folder), folder, folder)


def best_checkpoint(folder: Path) -> Path:
    """The best checkpoint of a run's folder.

    Raises:
        UserError: it holds no complete one.
    """
    newest = find_checkpoint(folder / "checkpoints")
    if newest is None:
        raise UserError(f"{folder}: holds no complete checkpoint")
    best = json.loads((newest / "state.json").read_text())["best_step"]
    return find_checkpoint(folder / "checkpoints", best) or newest


def trained_model(run: Run, vocabulary: Vocabulary, weights: Weights, origin: Path) -> Model:
    """The model of a run with its weights, in evaluation mode, on the host; teacher and queue where they are there.

    Raises:
        UserError: the weights do not fit; lists what is missing, unknown or of another shape.
    """
    model = empty_model(run if weights.has_teacher else without_teacher(run), len(vocabulary))
    load_strict(model, weights.tensors, origin)
    return model.eval()


def empty_model(run: Run, vocab_size: int) -> Model:
    """A model to load weights into: nothing is fetched, and the caller's random numbers stay where they are."""
    vision = run.vision.model_copy(update={"pretrained": False})
    with torch.random.fork_rng(devices=[]):
        return Model(run.model_copy(update={"vision": vision}), vocab_size)


def without_teacher(run: Run) -> Run:
    """The run as it stands when it is only used: neither teacher nor queue. Not a config one could train with."""
    return run.model_copy(update={"teacher": None, "queue": 0})


def _config(folder: Path) -> Run:
    """The stored config; word lists that lie beside it are read from there."""
    tree, beside = read_yaml(folder / CONFIG), {}
    for key, name in WORD_LISTS.items():
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value == name and (folder / name).is_file():
            beside[key] = str(folder / name)
    return load_run([folder / CONFIG], beside, presets=False)


def _read_official(file: Path) -> Weights:
    state, foreign = (load_tensors(file), []) if file.suffix == ".safetensors" else read_state(file)
    if any(name.startswith("student.") for name in state):
        raise UserError(f"{file}: holds weights under our names; give the folder it lies in, with its {CONFIG}")
    if is_uniter(state):
        return Weights(from_official_uniter(state))
    try:
        official = from_official(state)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    notes = [f"{head} of {file.name} is not read: it belongs to a fine-tuned task" for head in official.ignored]
    if foreign:
        few = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        notes.append(f"{len(foreign)} kinds of objects in {file.name} are left unread: {few}")
    return Weights(official.tensors, notes, official.layout)

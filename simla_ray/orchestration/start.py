"""What ``init_from`` names: another run, an exported folder, or an official file; and how it gets into a new run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simla_ray.config.schema import CodesKind, Run
from simla_ray.data.text import build_vocabulary
from simla_ray.errors import UserError
from simla_ray.models.decoder import PREFIX as DECODER
from simla_ray.models.decoder import decoder_start
from simla_ray.models.fit import adapted, listed, load_start, start_state
from simla_ray.models.model import Model
from simla_ray.orchestration.runs import find_run
from simla_ray.release.export import portable_manifest
from simla_ray.release.source import Source, empty_model, find_source

WORDS = "student.text.embeddings.word_embeddings.weight"
MIM_HEAD = "student.mim_head."
MLM_HEAD = "student.text.cls."
ANSWER_HEAD, LABEL_HEAD = "answer_head.", "label_head."


def find_start(path: Path, storage: Path) -> Path:
    """The absolute path of what ``init_from`` names: a file, a folder, or a run by its name under storage.

    Raises:
        UserError: nothing is there, or no weights yet.
    """
    where = path if path.is_file() else find_run(path, storage)
    find_source(where)
    return where.absolute()


def load_into(model: Model, run: Run) -> list[str]:
    """Load the start's weights into the student; the teacher starts as its copy elsewhere. Returns notes.

    Raises:
        UserError: they do not fit; one line that lists what is missing, unknown or of another shape.
    """
    source = _source(run)
    tensors, notes = _weights(run, source)
    tensors, more = _for_task(run, source, start_state(model), tensors)
    try:
        return notes + more + load_start(model, tensors, source.name)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None


def describe(run: Run) -> dict[str, Any] | None:
    """For the manifest: name, notes and manifest of the start; fits its weights to shapes, without a model.

    Raises:
        UserError: as ``load_into``, or the vocabulary cannot be the one that the weights know.
    """
    if run.init_from is None:
        return None
    source = _source(run)
    tensors, notes = _weights(run, source)
    with torch.device("meta"):
        shapes = start_state(empty_model(run, _vocabulary_size(run, source, tensors)))
    tensors, more = _for_task(run, source, shapes, tensors)
    try:
        notes += more + adapted(shapes, tensors, source.name)[1]
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    return {"name": source.name, "notes": notes, "manifest": portable_manifest(source.manifest())}


def lines_of(start: dict[str, Any] | None) -> list[str]:
    """What ``describe`` found, a line each."""
    if start is None:
        return []
    return [f"start      from {start['name']}", *(f"start      {note}" for note in start["notes"])]


def prepared_of_start(run: Run) -> Path | None:
    """Folder of the vocabulary and codes that the start's weights know; None where there is none."""
    return None if run.init_from is None else _source(run).prepared


def _source(run: Run) -> Source:
    assert run.init_from is not None
    return find_source(Path(run.init_from))


def _weights(run: Run, source: Source) -> tuple[dict[str, Tensor], list[str]]:
    """The start's tensors and notes; without the MIM head where it predicts other codes than this run's."""
    weights = source.read()
    theirs = source.run.codes.kind if source.run is not None else CodesKind.dvae
    tensors, notes = weights.tensors, list(weights.notes)
    if (theirs is CodesKind.dvae) is not (run.codes.kind is CodesKind.dvae):
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(MIM_HEAD)}
        if len(kept) < len(tensors) and "mim" in run.objectives.active():
            notes.append(f"mim_head of {source.name} predicts {theirs} codes, not {run.codes.kind} ones")
        tensors = kept
    return tensors, notes


def _for_task(
    run: Run, source: Source, ours: Mapping[str, Tensor], given: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The start's tensors as the run's task takes them, and notes.

    Heads that choose among answers or labels are taken where those are the same; a decoder where it has the same
    shapes, else it starts from the text stack, and what that does not give at random.
    """
    theirs = source.run.objectives if source.run is not None else None
    unfit = [ANSWER_HEAD]
    if theirs is None or theirs.labels != run.objectives.labels:
        unfit.append(LABEL_HEAD)
    parts = {name: tensor.shape for name, tensor in ours.items() if name.startswith(DECODER)}
    if parts and parts != {name: tensor.shape for name, tensor in given.items() if name.startswith(DECODER)}:
        unfit.append(DECODER)
    given = {name: tensor for name, tensor in given.items() if not name.startswith(tuple(unfit))}
    found = decoder_start(ours, given)
    if not found:
        return given, []
    kept = {name: tensor for name, tensor in given.items() if not name.startswith(MLM_HEAD)}  # it is the decoder's now
    left = [name for name in parts if name not in found]
    notes = [f"of the decoder {listed(left)} start at random: {source.name} has none that fit"] if left else []
    return {**kept, **{name: ours[name] for name in parts}, **found}, notes


def _vocabulary_size(run: Run, source: Source, tensors: dict[str, Tensor]) -> int:
    """Word pieces of the run, as far as they are known before data and network are touched."""
    if source.prepared is not None:
        return len(source.vocabulary())
    if run.text.vocab == "train":
        raise UserError(
            f"text.vocab: train makes new word ids, which the weights of {source.name} do not know; "
            "use the vocabulary they were trained with (bert-base-uncased)"
        )
    if Path(run.text.vocab).is_file():
        return len(build_vocabulary((), run.text))
    return len(tensors[WORDS]) if WORDS in tensors else run.text.vocab_size

"""What a run needs before its workers start: data, vocabulary, visual codes. Made once, kept in the run's folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simla_ray.config.load import to_dict
from simla_ray.config.rules import OF_TASKS
from simla_ray.config.schema import CodesKind, Run
from simla_ray.data import pipeline, world
from simla_ray.data.codes import kmeans
from simla_ray.data.concept_tokens import concepts_for
from simla_ray.data.concepts import CONCEPTS, Concepts
from simla_ray.data.index import Index, build_index, share_of
from simla_ray.data.questions import task_columns
from simla_ray.data.sources import images_are_files, read_rows
from simla_ray.data.text import Vocabulary, build_vocabulary, load_stop_words
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_tensors, save_tensors
from simla_ray.models.visual_codes import PatchCodes
from simla_ray.orchestration.prepare_regions import fit_region_codes, wants_region_codes
from simla_ray.orchestration.prepare_task import add_task
from simla_ray.orchestration.runs import load_trained
from simla_ray.orchestration.start import prepared_of_start
from simla_ray.release.source import CODES

SETS = ("train", "val", "test")
LOOKED_AT = 20
REPEATED = "repeated.safetensors"
#: Keys of ``data`` on which neither vocabulary nor codes of a pretraining depend.
NOT_LEARNED_FROM = ("val", "val_split", "test", "test_split", "decode_cpus", "audit")


@dataclass(frozen=True)
class Prepared:
    """``folder`` holds vocabulary and codes; the indexes cover train, val and test."""

    folder: Path
    indexes: dict[str, Index]
    vocabulary: Vocabulary
    #: (n,) ordinals of training rows whose uid an earlier one has.
    repeated: np.ndarray = field(default_factory=lambda: pipeline.NONE)

    def describe(self, run: Run) -> dict[str, Any]:
        """For the manifest: what the run is trained and judged on."""
        return {
            name: {
                "uris": uris_of(run, name)[0],
                "split": uris_of(run, name)[1],
                "rows": len(index),
                **({"left_out": index.left_out, "fraction": run.data.fraction} if index.left_out else {}),
                "fingerprint": index.fingerprint(),
            }
            for name, index in self.indexes.items()
        }


def build_indexes(run: Run) -> dict[str, Index]:
    """Index train, val and test; the built-in world must have been generated.

    Raises:
        UserError: missing or empty sets, missing columns, a set too small for one batch, or one without what
            ``eval.best`` is measured against.
    """
    indexes = {name: index_of(run, name) for name in SETS}
    order = pipeline.order_of(run, indexes["train"])
    if order.rows < run.batch.global_:
        left_out = indexes["train"].left_out
        why = f", {left_out} left out by data.fraction={run.data.fraction}" if left_out else ""
        raise UserError(
            f"data.train: {order.rows} rows are less than one step takes (batch.global={run.batch.global_}){why}"
        )
    for share, uri in zip(order.shares, run.data.train, strict=False):
        if order.planned(share) == 0:
            raise UserError(f"data.weights: {share.weight:g} of the rows of {uri} is less than one; leave it out")
    if len(indexes["val"]) < run.batch.micro:
        raise UserError(
            f"data.val: {len(indexes['val'])} rows are less than one micro-batch (batch.micro={run.batch.micro})"
        )
    if run.eval.best == "keyword_ap":
        _check_truth(run, indexes["val"])
    return indexes


def _check_truth(run: Run, val: Index) -> None:
    """Some validation image has to show what its first caption may leave unsaid; no image is read."""
    n, seen = min(run.eval.pairs, len(val)), set()
    for unit, places, _ in val.locate(np.arange(n)):
        for row in read_rows(unit, places, ("uid", "image_id", "captions", "keywords"), val.roots):
            if row.get("keywords") or len(row["captions"]) > 1 or row["image_id"] in seen:
                return
            seen.add(row["image_id"])
    raise UserError(
        "eval.best: keyword_ap needs the column keywords, or an image with two captions, in data.val; found neither "
        f"in the first {n} rows"
    )


def index_of(run: Run, name: str) -> Index:
    """Index train, of which ``data.fraction`` is kept, val or test.

    Raises:
        UserError: missing or empty sets, missing columns, or a share of a URI that is less than a row.
    """
    uris, split = uris_of(run, name)
    resolved = [world_uri(run, uri, f"data.{name}") for uri in uris]
    index = build_index(resolved, split, run.data.image_roots, f"data.{name}")
    if name != "train" or run.data.fraction == 1:
        return index
    part = share_of(index, run.data.fraction)
    for uri, had, has in zip(uris, index.per_uri, part.per_uri, strict=True):
        if had and not has:
            raise UserError(f"data.fraction: {run.data.fraction} of the rows of {uri} is less than one; leave it out")
    return part


def uris_of(run: Run, name: str) -> tuple[list[str], str | None]:
    """URIs and split filter of train, val or test."""
    uris, split = getattr(run.data, name), getattr(run.data, f"{name}_split")
    if uris is not None:
        return uris, split
    if run.data.val == ["world:val"]:
        return ["world:test"], split
    return run.data.val, split or run.data.val_split


def uses_world(run: Run) -> bool:
    return any(uri.startswith("world:") for name in SETS for uri in uris_of(run, name)[0])


def world_folder(run: Run) -> Path:
    """Where the built-in world of these keys lies: beside the runs, shared by them."""
    w = run.world
    name = f"world-{w.n_train}-{w.n_val}-{w.n_test}-{w.image_px}px-seed{w.seed}-v{world.WORLD_VERSION}"
    if w.questions:
        name += f"-q{w.questions}"
    return run.storage.resolve() / "worlds" / name


def generate_world(run: Run) -> None:
    """Generate the built-in world unless it is there."""
    w = run.world
    counts = {"train": w.n_train, "val": w.n_val, "test": w.n_test}
    world.generate(world_folder(run), counts, w.image_px, w.seed, questions=w.questions)


def prepare(run: Run, folder: Path, cpus: int, shared: Path | None = None) -> Prepared:
    """Index the data, and build vocabulary and codes as Ray Data jobs unless ``folder`` holds them already.

    Needs a running Ray. The folder appears in one piece: a killed preparation leaves nothing behind.

    Args:
        shared: folder in which other runs over the same data may have left theirs, and will find this run's.
    """
    if uses_world(run):
        generate_world(run)
    indexes = build_indexes(run)
    check_rows(indexes)
    if shared is not None and not folder.exists():
        with _in_one_piece(folder) as unfinished:
            shutil.copytree(_make_shared(run, indexes, shared, cpus), unfinished, dirs_exist_ok=True)
    _make(run, indexes, folder, cpus)
    repeated = load_tensors(folder / REPEATED)["ordinals"].numpy()
    if len(repeated) > run.data.max_drop_fraction * len(indexes["train"]):
        raise UserError(
            f"data.max_drop_fraction: {len(repeated)} of {len(indexes['train'])} rows of data.train have the uid of an "
            f"earlier row, more than the allowed {run.data.max_drop_fraction}"
        )
    return Prepared(folder, indexes, Vocabulary.load(folder), repeated)


def prepare_shared(run: Run, shared: Path, cpus: int) -> Prepared:
    """Make data, vocabulary and codes before the first of several runs asks for them."""
    if uses_world(run):
        generate_world(run)
    indexes = build_indexes(run)
    check_rows(indexes)
    kept = _make_shared(run, indexes, shared, cpus)
    return Prepared(kept, indexes, Vocabulary.load(kept))


def _make_shared(run: Run, indexes: dict[str, Index], shared: Path, cpus: int) -> Path:
    """Vocabulary and codes among those that runs keep for each other; one run at a time makes some."""
    shared.mkdir(parents=True, exist_ok=True)
    kept = shared / _key(run, indexes["train"])
    with (shared / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make(run, indexes, kept, cpus)
    return kept


def _key(run: Run, train: Index) -> str:
    """Names what vocabulary and codes depend on; runs that differ elsewhere share them."""
    tree = to_dict(run)
    parts = {
        name: tree[name]
        for name in ("task", "init_from", "seed", "data", "text", "vision", "codes", "world", "concepts")
    }
    parts |= {name: tree["objectives"][name] for name in OF_TASKS}
    parts |= {"mim": "mim" in run.objectives.active(), "rows": train.fingerprint()}
    if not task_columns(run):  # a trial is evaluated on the validation set, and learns from the same rows
        parts["data"] = {name: value for name, value in tree["data"].items() if name not in NOT_LEARNED_FROM}
    if wants_region_codes(run):
        parts["regions"] = tree["regions"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _in_one_piece(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name in the end."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)


def _make(run: Run, indexes: dict[str, Index], folder: Path, cpus: int) -> None:
    """Build vocabulary and codes unless the folder is there."""
    if folder.exists():
        return
    with _in_one_piece(folder) as unfinished:
        start = prepared_of_start(run)
        captions = pipeline.CaptionPass(indexes["train"], run.text.max_words, cpus)
        given = Vocabulary.load(start).tokenizer if start is not None else None
        vocabulary = build_vocabulary(captions, run.text, given)
        if task_columns(run):
            add_task(run, indexes, vocabulary, unfinished)
        if run.text.concepts:
            vocabulary.concepts = _concepts(run, indexes["train"], vocabulary, start, cpus)
        vocabulary.save(unfinished)
        save_tensors({"ordinals": torch.from_numpy(captions.repeated)}, unfinished / REPEATED)
        if run.codes.kind is not CodesKind.dvae and "mim" in run.objectives.active():
            if start is not None and (start / CODES).exists():
                centroids = load_tensors(start / CODES)["centroids"]
            else:
                centroids = torch.from_numpy(_fit_codes(run, indexes["train"], cpus))
            save_tensors({"centroids": centroids}, unfinished / CODES)
        if wants_region_codes(run):
            fit_region_codes(run, indexes["train"], unfinished, cpus)


def _concepts(run: Run, train: Index, vocabulary: Vocabulary, start: Path | None, cpus: int) -> Concepts:
    """The concepts that the start's weights know, or those of the training captions."""
    if start is not None and (start / CONCEPTS).exists():
        return Concepts.load(start / CONCEPTS)
    counts, captions = pipeline.concept_counts(run, train, cpus)
    return concepts_for(run, vocabulary, counts, captions)


def check_rows(indexes: dict[str, Index]) -> None:
    """Look at the first rows of every set, so that a wrong folder of images is said before any worker starts."""
    for name, index in indexes.items():
        unit = index.units[0]
        rows = read_rows(unit, np.arange(min(LOOKED_AT, len(unit))), ("uid", "image", "captions"), index.roots)
        if images_are_files(unit) and all(isinstance(row["image"], str) for row in rows):
            raise UserError(
                f"data.{name}: none of the first {len(rows)} images of {unit.path} is found ({rows[0]['image']}); "
                "see data.image_roots"
            )


def load_tokenizer(run: Run, prepared: Path) -> torch.nn.Module | None:
    """The frozen visual tokenizer of a run; None without MIM."""
    if "mim" not in run.objectives.active():
        return None
    if run.codes.kind is CodesKind.dvae:
        from simla_ray.models.dvae import DalleEncoder

        assert run.codes.source is not None
        return DalleEncoder.load(run.codes.source)
    centroids = load_tensors(prepared / CODES)["centroids"]
    tower = _frozen_tower(run) if run.codes.kind is CodesKind.features else None
    return PatchCodes(centroids, run.vision.patch_px, tower)


def keyword_columns(run: Run, vocabulary: Vocabulary) -> torch.Tensor | None:
    """(V',) ids that ``psl.vocab`` restricts PSL to; None for all."""
    psl = run.objectives.psl
    if psl is None or psl.vocab is None:
        return None
    ids = {i for word in load_stop_words(str(psl.vocab)) for i in vocabulary.word_ids(word)} - vocabulary.special_ids
    if not ids:
        raise UserError(f"objectives.psl.vocab: {psl.vocab} names no word of the vocabulary")
    return torch.tensor(sorted(ids))


def _fit_codes(run: Run, train: Index, cpus: int):
    featurise = None
    if run.codes.kind is CodesKind.features:
        tower = _frozen_tower(run)

        def featurise(images):
            return PatchCodes(torch.zeros(1, 1), run.vision.patch_px, tower).features(torch.from_numpy(images)).numpy()

    points = pipeline.patch_features(run, train, featurise, cpus)
    return kmeans(points, run.codes.n, run.codes.iterations, run.seed)


def _frozen_tower(run: Run):
    """The student's image tower of the run that ``codes.source`` names."""
    assert run.codes.source is not None
    other, model, _ = load_trained(run.codes.source)
    if other.vision.image_px != run.vision.image_px or other.vision.patch_px != run.vision.patch_px:
        raise UserError(
            f"codes.source: {run.codes.source} has {other.vision.image_px} px images in {other.vision.patch_px} px "
            f"patches, this run {run.vision.image_px} and {run.vision.patch_px}"
        )
    return model.student.vision


def world_uri(run: Run, uri: str, key: str) -> str:
    if not uri.startswith("world:"):
        return uri
    split = uri.removeprefix("world:")
    if split not in SETS:
        raise UserError(f"{key}: {uri} is not one of world:train, world:val, world:test")
    return str(world_folder(run) / f"{split}-*.parquet")

"""What can be seen before anything is started: mistakes in config, data and resources,
and the plan of ``--dry-run``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simla_ray.config.load import load_run, to_dict
from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.index import Index
from simla_ray.data.order import Order, Share
from simla_ray.data.sources.files import absolute
from simla_ray.data.text import load_stop_words
from simla_ray.errors import UserError
from simla_ray.orchestration.cluster import check_local_devices, join, joins
from simla_ray.orchestration.manifest import fallbacks
from simla_ray.orchestration.plan import plan, total_steps
from simla_ray.orchestration.prepare import (
    SETS,
    build_indexes,
    check_rows,
    uris_of,
    uses_world,
    world_folder,
    world_uri,
)
from simla_ray.orchestration.runs import check_same_run, fresh_name, run_folder
from simla_ray.orchestration.start import describe, find_start, lines_of
from simla_ray.training.checkpoint import find_checkpoint

#: Keys that name a file, a folder, or by a word something else, relative to where the command was given.
FILE_KEYS = ("vision.weights", "text.vocab", "objectives.psl.stop_words", "objectives.psl.vocab")
FOLDER_KEYS = ("text.weights", "codes.source")
#: Values that are no paths, whatever lies in the working directory.
WORDS = ("train", "en")


def check(run: Run) -> tuple[Run, dict[str, Index] | None]:
    """Look for everything that would stop the run, without starting Ray.

    Returns:
        The run with absolute paths, and the indexes of its data; None where the built-in world is still to be
        generated.

    Raises:
        UserError: the first thing that is wrong.
    """
    if joins(run) is None:
        check_local_devices(run)
    psl = run.objectives.psl
    if psl is not None:
        for words in (psl.stop_words, psl.vocab):
            load_stop_words(str(words) if words is not None else None)
    for key, path in (("codes.source", run.codes.source), ("vision.weights", run.vision.weights)):
        if path is not None and not path.exists():
            raise UserError(f"{key}: {path} does not exist")
    absolute = _with_absolute_paths(run)
    if uses_world(run):
        for name in SETS:
            for uri in uris_of(run, name)[0]:
                world_uri(run, uri, f"data.{name}")
        if not (world_folder(run) / "world.json").exists():
            return absolute, None
    indexes = build_indexes(run)
    check_rows(indexes)
    return absolute, indexes


def dry_run(run: Run) -> str:
    """The plan of a run and its arithmetic, a line each. A cluster that the config names is joined and looked at."""
    run, indexes = check(run)
    if run.name is not None:
        check_same_run(run)
    if joins(run) is None:
        lines = ["cluster    a Ray of its own would be started on this machine"]
    else:
        lines = [join(run).line()]
    lines.append(f"run        {run.label}, seed {run.seed} -> {run.storage.resolve() / (run.name or fresh_name(run))}")
    if indexes is None:
        w = run.world
        lines.append(
            f"data       the built-in world would be generated: {w.n_train} train, {w.n_val} val, {w.n_test} test"
        )
        shares = tuple(Share(0, 1, weight) for weight in run.data.weights or ())
        order = Order((w.n_train,), run.micro_batches, run.data.shuffle_window, run.seed, shares)
    else:
        order = pipeline.order_of(run, indexes["train"])
        for name, index in indexes.items():
            uris, split = uris_of(run, name)
            kept = f", split {split}" if split else ""
            groups = f"{len(index.units)} row group{'s' * (len(index.units) != 1)}"
            lines.append(f"data       {name}: {len(index)} rows in {groups} of {', '.join(uris)}{kept}")
    newest = find_checkpoint(run_folder(run) / "checkpoints") if run.name is not None else None
    lines += plan(run, order, total_steps(run, order, newest))
    lines += [f"differs    {f}" for f in fallbacks(run)]
    lines += lines_of(describe(run))
    lines.append("dry run    nothing was trained; the same command without --dry-run does it")
    return "\n".join(lines)


def _with_absolute_paths(run: Run) -> Run:
    changes: dict[str, Any] = {"storage": str(run.storage.absolute())}
    if run.init_from is not None:
        changes["init_from"] = str(find_start(Path(run.init_from), run.storage))
    tree = to_dict(run)
    for key in (*FILE_KEYS, *FOLDER_KEYS):
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None or value in WORDS:
            continue
        path = Path(value)
        if path.is_file() or (key in FOLDER_KEYS and path.is_dir()):
            changes[key] = str(path.absolute())
    for name in SETS:
        uris = getattr(run.data, name)
        if uris is not None:
            changes[f"data.{name}"] = [u if u.startswith("world:") else absolute(u) for u in uris]
    changes["data.image_roots"] = [str(root.absolute()) for root in run.data.image_roots]
    return load_run(overrides={**tree, **changes}, presets=False)

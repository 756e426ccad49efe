"""What can be seen before anything is started: mistakes in config and data, what is missing on the nodes of a cluster,
and the plan of ``--dry-run``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from simla_ray.config.load import load_run, to_dict
from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.concept_source import check_phrases
from simla_ray.data.index import Index
from simla_ray.data.order import Order, Share
from simla_ray.data.region_source import with_regions
from simla_ray.data.sources.files import absolute, is_remote, size
from simla_ray.data.tag_source import with_tags
from simla_ray.data.text import load_stop_words
from simla_ray.errors import UserError
from simla_ray.orchestration.cluster import Cluster, check_local_devices, join, joins, uses_gpu
from simla_ray.orchestration.manifest import PACKAGES, fallbacks
from simla_ray.orchestration.plan import plan, total_steps
from simla_ray.orchestration.preflight import capacity, environment
from simla_ray.orchestration.preflight.checks import Case, Check, require
from simla_ray.orchestration.preflight.footprint import footprint
from simla_ray.orchestration.preflight.nodes import Node, ask, marked, ray_nodes, try_gpus
from simla_ray.orchestration.preflight.probes import File, default_object_store, existing, look
from simla_ray.orchestration.preflight.trial import samples_per_s, try_step
from simla_ray.orchestration.prepare import (
    SETS,
    build_indexes,
    check_rows,
    uris_of,
    uses_world,
    world_folder,
    world_uri,
)
from simla_ray.orchestration.region_tower import with_tower
from simla_ray.orchestration.runs import begun_run, check_same_run, fresh_name, run_folder
from simla_ray.orchestration.start import describe, find_start, lines_of
from simla_ray.training.checkpoint import find_checkpoint

#: Keys that name a file, a folder, or by a word something else, relative to where the command was given.
FILE_KEYS = ("vision.weights", "text.vocab", "objectives.psl.stop_words", "objectives.psl.vocab")
TOWER_KEY = "regions.weights"
FOLDER_KEYS = ("text.weights", "codes.source", TOWER_KEY)
#: Values that are no paths, whatever lies in the working directory.
WORDS = ("train", "en")
#: Files of a set that every node opens at most, evenly spread over the set; of those in a store only one.
OPENED = 16
#: A CPU tries steps that keep at most so many bytes; larger ones take too long to try.
TRIED_ON_CPU = 2**30


def check(run: Run, *, devices: bool = True) -> tuple[Run, dict[str, Index] | None]:
    """Look for everything that would stop the run, without starting Ray.

    Args:
        devices: False where this process need not see what the workers will.

    Returns:
        The run with absolute paths and the sources of its regions and tags decided, and the indexes of its data; None
        where the built-in world is still to be generated.

    Raises:
        UserError: the first thing that is wrong.
    """
    if devices and joins(run) is None:
        check_local_devices(run)
    _check_storage(run.storage)
    psl = run.objectives.psl
    if psl is not None:
        for words in (psl.stop_words, psl.vocab):
            load_stop_words(str(words) if words is not None else None)
    for key, path in (("codes.source", run.codes.source), ("vision.weights", run.vision.weights)):
        if path is not None and not path.exists():
            raise UserError(f"{key}: {path} does not exist")
    absolute = with_tower(with_absolute_paths(run))
    if uses_world(run):
        for name in SETS:
            for uri in uris_of(run, name)[0]:
                world_uri(run, uri, f"data.{name}")
        if not (world_folder(run) / "world.json").exists():
            return with_tags(with_regions(absolute, None), None), None
    indexes = build_indexes(run)
    check_rows(indexes)
    check_phrases(run, {f"data.{name}": index for name, index in indexes.items()})
    return with_tags(with_regions(absolute, indexes), indexes), indexes


def check_cluster(
    run: Run, cluster: Cluster, indexes: dict[str, Index] | None, say: Callable[[str], None] = print
) -> None:
    """Look at the nodes of the cluster that was joined, and say what may become a problem.

    Args:
        run: as ``check`` gives it.
        indexes: of its data; None where the built-in world is still to be generated.

    Raises:
        UserError: a line for everything that is missing.
    """
    checks = judge(_look_around(run, cluster, indexes))
    for each in checks:
        if each.warning:
            say(each.line())
    require(checks)


def dry_run(run: Run, say: Callable[[str], None] = print) -> None:
    """Say the plan of a run, its arithmetic and what was checked. A cluster that the config names is joined.

    Raises:
        UserError: as ``check`` and ``check_cluster``.
    """
    run, indexes = check(run)
    if run.name is not None:
        check_same_run(run)
    cluster = join(run) if joins(run) is not None else None
    lines = [cluster.line() if cluster else "cluster    a Ray of its own would be started on this machine"]
    lines.append(f"run        {run.label}, seed {run.seed} -> {run.storage.resolve() / (run.name or fresh_name(run))}")
    if indexes is None:
        w = run.world
        lines.append(
            f"data       the built-in world would be generated: {w.n_train} train, {w.n_val} val, {w.n_test} test"
        )
        shares = tuple(Share(0, 1, weight) for weight in run.data.weights or ())
        scenes = round(run.data.fraction * w.n_train)
        left_out = w.n_train - scenes
        order = Order((scenes,), run.micro_batches, run.data.shuffle_window, run.seed, shares)
    else:
        order, left_out = pipeline.order_of(run, indexes["train"]), indexes["train"].left_out
        for name, index in indexes.items():
            uris, split = uris_of(run, name)
            kept = f", split {split}" if split else ""
            groups = f"{len(index.units)} row group{'s' * (len(index.units) != 1)}"
            lines.append(f"data       {name}: {len(index)} rows in {groups} of {', '.join(uris)}{kept}")
    newest = find_checkpoint(run_folder(run) / "checkpoints") if run.name is not None else None
    lines += plan(run, order, total_steps(run, order, newest), left_out)
    lines += [f"differs    {f}" for f in fallbacks(run)]
    lines += lines_of(describe(run))
    for line in lines:
        say(line)
    case = _look_around(run, cluster, indexes)
    if not case.gpu and case.footprint.batch <= min(TRIED_ON_CPU, case.driver.memory // 2):
        case = replace(case, trials={"this machine": try_step(run, "cpu")})
    if indexes is not None:
        case = replace(case, samples_per_s=samples_per_s(run, indexes["train"]))
    checks = judge(case)
    for each in checks:
        if not each.miss:
            say(each.line())
    require(checks)
    say("dry run    nothing was trained; the same command without --dry-run does it")


def judge(case: Case) -> list[Check]:
    """All checks, in the order in which one would put things right."""
    run = case.run
    between = () if case.own else (environment.answering, environment.packages, environment.clocks)
    return [
        *(check(case) for check in between),
        *capacity.room(run, case.nodes, case.gpu, cores=case.driver.cores if case.own else None),
        environment.storage(case),
        environment.data(case),
        capacity.disk(case),
        environment.ray_folder(case),
        capacity.memory(case),
        capacity.object_store(case),
        *capacity.one_batch(case),
        *capacity.decoding(case),
    ]


def _look_around(run: Run, cluster: Cluster | None, indexes: dict[str, Index] | None) -> Case:
    """Ask the nodes of the cluster; of a Ray of its own, which need not be started, this machine."""
    own = cluster is None or cluster.own
    gpu = uses_gpu(run, cluster.gpus if cluster is not None else torch.cuda.device_count())
    nodes = ray_nodes() if cluster is not None else [_this_machine(run)]
    takes, files = footprint(run, gpu=gpu), tuple(_needed_files(run, indexes))
    with marked(run.storage, files, PACKAGES) as questions:
        driver = look(questions, "this")
        nodes = [replace(nodes[0], name="this machine", answers=driver)] if own else ask(nodes, questions)
    trials = {}
    if gpu:
        trials = try_gpus(nodes, run) if cluster is not None else {nodes[0].name: try_step(run, "cuda")}
    checkpoints = run_folder(run) / "checkpoints" if run.name is not None else None
    return Case(
        run=run,
        nodes=nodes,
        own=own,
        gpu=gpu,
        driver=driver,
        storage=shutil.disk_usage(existing(run.storage)).free,
        footprint=takes,
        files=len(files),
        trials=trials,
        resumes=checkpoints is not None and any(checkpoints.glob("*/manifest.json")),
    )


def _this_machine(run: Run) -> Node:
    """What a Ray of its own would be: as many logical CPUs as the run asks for."""
    cpus = max(run.ray.workers * run.ray.cpus_per_worker + run.data.decode_cpus, os.cpu_count() or 1)
    return Node("this machine", cpus, torch.cuda.device_count(), default_object_store())


def _needed_files(run: Run, indexes: dict[str, Index] | None) -> Iterator[File]:
    """What every node must be able to read: some files of every set, folders of images, weights."""
    seen: set[str] = set()
    for name, index in (indexes or {}).items():
        paths = [p for p in dict.fromkeys(unit.path for unit in index.units) if p not in seen]
        seen.update(paths)
        on_disk = [p for p in paths if not is_remote(p)]
        in_store = [p for p in paths if is_remote(p)]
        for path in (*on_disk[:: len(on_disk) // OPENED + 1], *in_store[:1]):
            yield File(f"data.{name}", path, None if Path(path).is_dir() else size(path))
    for root in run.data.image_roots:
        yield File("data.image_roots", str(root))
    tree = to_dict(run)
    for key in (*FILE_KEYS, *FOLDER_KEYS, "init_from"):
        value = _value(tree, key)
        if value is None or not Path(value).is_absolute():
            continue
        if key != TOWER_KEY or begun_run(run) is None:  # else the tower is in the checkpoint
            yield File(key, value)


def _check_storage(storage: Path) -> None:
    place = existing(storage)
    if not place.is_dir():
        raise UserError(f"storage: {storage} cannot be a folder, because {place} is a file; name another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"storage: {storage} cannot be written, because {place} is not writable; name another")


def _value(tree: dict[str, Any], key: str) -> Any:
    value: Any = tree
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def with_absolute_paths(run: Run) -> Run:
    """Of all keys that name files; relative ones are where the command is given."""
    changes: dict[str, Any] = {"storage": str(run.storage.absolute())}
    if run.init_from is not None:
        changes["init_from"] = str(find_start(Path(run.init_from), run.storage))
    tree = to_dict(run)
    for key in (*FILE_KEYS, *FOLDER_KEYS):
        value = _value(tree, key)
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

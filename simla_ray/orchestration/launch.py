"""A ``Run`` -> a TorchTrainer, a finished folder, a summary."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from simla_ray.config.load import to_yaml
from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.orchestration import cluster as clusters
from simla_ray.orchestration.failures import FailureLog
from simla_ray.orchestration.manifest import check_data, write_manifest
from simla_ray.orchestration.plan import plan, total_steps
from simla_ray.orchestration.preflight import check, check_cluster
from simla_ray.orchestration.prepare import Prepared, prepare
from simla_ray.orchestration.progress import Progress
from simla_ray.orchestration.runs import changed_keys, check_same_run, fresh_name, run_folder
from simla_ray.orchestration.start import describe, lines_of
from simla_ray.orchestration.summary import write_summary
from simla_ray.orchestration.worker import build_losses, train_worker
from simla_ray.report.page import write_report
from simla_ray.training.checkpoint import find_checkpoint
from simla_ray.training.events import legs_of, log_event, stopped
from simla_ray.training.legs import FENCE_S, fence, tidy
from simla_ray.whole import write_whole

#: Larger blocks from the allocator: without them small CPU steps stall for seconds now and then.
WORKER_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
#: Seconds between two looks whether an elastic group can grow.
RESIZE_S = 30.0


@dataclass(frozen=True)
class Within:
    """What the runs of a sweep or a comparison share.

    Args:
        cluster: that was joined and looked at.
        shared: folder in which those over the same data keep vocabulary and codes for each other.
    """

    cluster: clusters.Cluster
    shared: Path


def pretrain(run: Run, say: Callable[[str], None] = print, within: Within | None = None) -> dict[str, Any]:
    """Train, evaluate and report; goes on with an interrupted run of the same name.

    Args:
        within: of a run that is one of several.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: anything wrong with config, data or resources, before a worker starts; or a changed ``identity`` key.
    """
    summary = _train(run, say, within, None)
    assert summary is not None
    return summary


def pretrain_until(run: Run, step: int, say: Callable[[str], None], within: Within) -> None:
    """Train up to a step before the last one, where a checkpoint is left for others to go on from."""
    _train(run, say, within, step)


def _train(run: Run, say: Callable[[str], None], within: Within | None, until: int | None) -> dict[str, Any] | None:
    """The summary; None where the run was only to go ``until`` a step."""
    run, indexes = check(run, devices=within is None)  # every mistake that can be seen now is said before Ray starts
    if run.name is None:
        run = run.model_copy(update={"name": fresh_name(run)})
    folder = run_folder(run)
    finished = folder / "summary.json"
    stored = folder / "config.yaml"
    check_same_run(run)
    if finished.exists():
        say(f"run        {folder} is finished")
        return json.loads(finished.read_text())
    changed = changed_keys(run)
    start = describe(run) if find_checkpoint(folder / "checkpoints") is None else None
    for key, (was, now) in changed.items():
        say(f"changed    {key}: {was} -> {now}")
    for line in lines_of(start):
        say(line)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, 0 if within is None else FENCE_S):
        newest, damaged = _take_over(folder)
        if within is None:
            cluster = clusters.join(run)
            say(cluster.line())
        else:
            cluster = within.cluster
        for name in damaged:
            say(f"damaged    checkpoint {name} is set aside; {'an older one' if newest else 'none other'} is there")
        if within is None:
            check_cluster(run, cluster, indexes, say)
        pipeline.quiet()
        began = time.perf_counter()
        say("prepare    data, vocabulary and visual codes" if not (folder / "prepared").exists() else "prepare    data")
        prepared = prepare(run, folder / "prepared", run.data.decode_cpus, within.shared if within else None)
        check_data(folder, run, prepared)
        if newest is None:
            build_losses(run, prepared, torch.device("cpu"))  # weights and codes that cannot be used are said here
        write_whole(stored, to_yaml(run))
        total = total_steps(run, pipeline.order_of(run, prepared.indexes["train"]), newest)
        say(banner(run, folder, prepared, total, time.perf_counter() - began))
        write_manifest(folder, run, prepared, cluster, start)
        _fit(run, folder, prepared, total, min(total, until or total), cluster, changed, say)
        if until is not None and until < total:
            return None
        summary = write_summary(folder, run, prepared, total)
        write_report(folder)
    return summary


def _take_over(folder: Path) -> tuple[Path | None, list[str]]:
    """Wait for the workers of an earlier command to end, and tidy up.

    Returns:
        The checkpoint to go on from, and the names of damaged ones.
    """
    checkpoints = folder / "checkpoints"
    with fence(folder):
        (folder / "stopped.json").unlink(missing_ok=True)
        damaged = tidy(checkpoints)
        for name in damaged:
            log_event(folder, "checkpoint_damaged", name=name)
    return find_checkpoint(checkpoints), damaged


def banner(run: Run, folder: Path, prepared: Prepared, total: int, prepare_s: float) -> str:
    """What is about to happen, with the arithmetic of the batch."""
    sizes = ", ".join(f"{len(index)} {name}" for name, index in prepared.indexes.items())
    return "\n".join(
        (
            f"run        {run.label}, seed {run.seed} -> {folder}",
            f"data       {sizes} rows; {len(prepared.vocabulary)} word pieces (ready after {prepare_s:.0f} s)",
            *plan(run, pipeline.order_of(run, prepared.indexes["train"]), total, prepared.indexes["train"].left_out),
        )
    )


def _fit(
    run: Run,
    folder: Path,
    prepared: Prepared,
    total: int,
    until: int,
    cluster: clusters.Cluster,
    changed: dict[str, list[Any]],
    say: Callable[[str], None],
) -> None:
    gpu = clusters.uses_gpu(run, cluster.gpus)
    # Ray takes what workers report, and sees that they are done, only when it looks: every two seconds if not told.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if cluster.own:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # its only node goes with this process
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train page
    if run.ray.min_workers is not None:
        # Ray asks for as many workers as it had until this is over; only then it counts the nodes anew.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    trainer = ray.train.torch.TorchTrainer(
        partial(train_worker, prepared),  # the Train page shows what is in the config
        train_loop_config={
            "folder": str(folder),
            "name": run.name,
            "total_steps": total,
            "until": until,
            "legs": legs_of(folder),
            "changed": changed,
        },
        scaling_config=ScalingConfig(
            num_workers=run.ray.workers if run.ray.min_workers is None else (run.ray.min_workers, run.ray.workers),
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=gpu,
            resources_per_worker={"CPU": run.ray.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            storage_path=str(run.storage.resolve()),
            name=f"{run.name}/checkpoints",
            checkpoint_config=CheckpointConfig(
                num_to_keep=run.checkpoint.keep, checkpoint_score_attribute=run.eval.best, checkpoint_score_order="max"
            ),
            # Ray would count the failures of a week; ours counts those without a checkpoint between them.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[FailureLog(folder, run.ray.max_failures, len(read_lines(folder / "events.jsonl")))],
            worker_runtime_env={"env_vars": WORKER_ENV},
        ),
        # The watchdog comes first: it can say who hangs.
        torch_config=TorchConfig(timeout_s=round(4 * run.ray.hang_timeout_s)),
    )
    try:
        with Progress(folder, until, say, partial(clusters.room_for, run, gpu)):
            trainer.fit()
    finally:
        why = stopped(folder)
        if why is not None:
            raise UserError(why) from None


class locked:  # noqa: N801  (a context manager, used like a function)
    """One process at a time in a run's folder; one that was told to end has ``wait_s`` seconds for it."""

    def __init__(self, folder: Path, wait_s: float = 0.0):
        self.path, self.wait_s = folder / ".lock", wait_s

    def __enter__(self) -> None:
        self.file = self.path.open("w")
        until = time.monotonic() + self.wait_s
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() >= until:
                    self.file.close()
                    raise UserError(
                        f"{self.path.parent}: another process is running this run; give it another --name"
                    ) from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.file.close()


logging.getLogger("ray.train").setLevel(logging.ERROR)

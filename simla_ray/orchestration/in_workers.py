"""Collective work that is no training, in workers of a cluster: its GPUs are seldom where commands are given."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.errors import UserError
from simla_ray.orchestration import cluster as clusters
from simla_ray.orchestration.failures import last_line
from simla_ray.training.comm import Comm

R = TypeVar("R")
#: What Ray Train keeps for itself meanwhile; a folder that every worker sees.
SCRATCH = ".workers"


def in_workers(
    work: Callable[[Comm, torch.device], R], run: Run, workers: int, folder: Path, say: Callable[[str], None]
) -> R:
    """Have every worker of a group do its part; returns what rank 0 does.

    Args:
        work: collective; a ``UserError`` of it comes from all ranks.
        run: for what a worker takes: ``ray.cpus_per_worker``, ``ray.device``. The cluster is that of RAY_ADDRESS; one
            that the run was trained on may be gone.
        folder: shared between nodes.

    Raises:
        UserError: no room for the workers, one was lost, or that of the work.
    """
    each = run.ray.cpus_per_worker
    ours = run.ray.model_copy(update={"address": None, "workers": workers, "min_workers": None})
    run = run.model_copy(update={"ray": ours, "data": run.data.model_copy(update={"decode_cpus": 0})})
    if workers < 1:
        raise UserError(f"--workers: {workers} is below 1")
    cluster = clusters.join(run)
    say(cluster.line())
    if cluster.cpus < workers * each:
        raise UserError(f"--workers: {workers} of {each:g} CPUs each, but the cluster has {cluster.cpus:g} CPUs")
    gpu = clusters.uses_gpu(run, cluster.gpus)
    if gpu and cluster.gpus < workers:
        raise UserError(
            f"--workers: {workers} of a GPU each (ray.device=gpu), but the cluster has {cluster.gpus:g} GPUs"
        )
    pipeline.quiet()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    name = f"{SCRATCH}-{uuid.uuid4().hex[:8]}"  # another evaluation of the run may go on
    try:
        result = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"work": work, "threads": max(1, int(each))},
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": each, **({"GPU": 1} if gpu else {})}
            ),
            run_config=RunConfig(storage_path=str(folder), name=name, failure_config=FailureConfig(max_failures=0)),
        ).fit()
    except TrainingFailedError as error:
        raise UserError(f"--workers: {last_line(error)}") from error
    except OSError as error:
        raise UserError(f"--workers: {folder} must be writable for every worker ({error})") from None
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)
    if isinstance(result.return_value, UserError):
        raise result.return_value
    return result.return_value


def _worker(config: dict[str, Any]) -> Any:
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    try:
        return config["work"](Comm(), device)
    except UserError as error:  # Ray would hand on a traceback
        return error

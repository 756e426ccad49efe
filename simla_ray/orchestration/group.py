"""What a group of workers asks of Ray Train: registering checkpoints, notices of nodes that go.

Each part of Ray's interface that is still alpha is used in one function here.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode

from simla_ray.config.schema import Run
from simla_ray.training.saver import Saved


def register(run: Run, checkpoints: Path, saved: Saved, rank: int) -> None:
    """Collective: tell Ray of a checkpoint that lies where it belongs; Ray decides how long it stays."""
    ray.train.report(
        {run.eval.best: saved.score if saved.score is not None else -math.inf, "step": saved.step},
        checkpoint=ray.train.Checkpoint.from_directory(str(checkpoints / saved.folder)) if rank == 0 else None,
        checkpoint_dir_name=saved.folder,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )


def registered() -> set[str]:
    """Names of the checkpoints that Ray knows."""
    found = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    return {Path(one.checkpoint.path).name for one in found}


def notice() -> dict[str, Any] | None:
    """Collective: the nodes of this group that will go, and the seconds left; None where none will."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    left = None if info.deadline_ms is None else round(info.deadline_ms / 1000 - time.time(), 1)
    return {"ranks": info.preempted_ranks, "left_s": left}

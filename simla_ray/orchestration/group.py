"""What a group of workers asks of Ray Train: registering checkpoints, notices of nodes that go, failures.

Each part of Ray's interface that is still alpha is used in one function here.
"""

from __future__ import annotations

import math
import textwrap
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.v2.api.callback import UserCallback  # not exported elsewhere in this release

from simla_ray.config.schema import Run
from simla_ray.training.legs import end_is_known, failures_in_a_row, note_stop, stopped
from simla_ray.training.log import log_event
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


#: Starts of the workers after a run was given up: the first of them should look at the note, and end.
IN_VAIN = 2


class FailureLog(UserCallback):
    """Writes down why workers failed, and ends a run that gets nowhere. It lives in Ray's controller.

    Args:
        folder: of the run.
        most: failures in a row, with no new checkpoint between them, that it may have.
        since: events of earlier commands.
    """

    def __init__(self, folder: Path, most: int, since: int):
        self.folder, self.most, self.since = folder, most, since
        self.in_vain = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if stopped(self.folder) is not None:
            self.in_vain += 1
            if self.in_vain > IN_VAIN:  # Ray does not try again after an error of its own controller
                raise RuntimeError("the workers fail before they can see that the run has been given up")
            return
        if not end_is_known(self.folder):
            lines = {str(rank): _line(error) for rank, error in sorted(worker_exceptions.items())}
            first = next(iter(lines))
            log_event(self.folder, "failure", reason=f"worker {first}: {lines[first]}", workers=lines)
        failures = failures_in_a_row(self.folder, self.since)
        if len(failures) > self.most:
            note_stop(
                self.folder,
                f"ray.max_failures: {len(failures)} failures in a row without a new checkpoint, the last: "
                f"{failures[-1]}; tracebacks, where there were any, are in {self.folder.name}/failures.txt. The same "
                "command tries again",
            )


def _line(error: BaseException) -> str:
    """The last line of what an error says, which is the cause where Ray wraps one."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 200, placeholder=" ...") if lines else type(error).__name__

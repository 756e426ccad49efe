"""Failures of workers, as Ray's controller sees them; it loads this and no model."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ray.train.v2.api.callback import UserCallback  # not exported elsewhere in this release

from simla_ray.training.events import end_is_known, failures_in_a_row, log_event, note_stop, stopped

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
            lines = {str(rank): last_line(error) for rank, error in sorted(worker_exceptions.items())}
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


def last_line(error: BaseException) -> str:
    """The last line of what an error says, which is the cause where Ray wraps one."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 200, placeholder=" ...") if lines else type(error).__name__

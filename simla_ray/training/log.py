"""What a run writes down while it trains; rank 0 only.

metrics.jsonl    one line per step (kind "train") and per validation (kind "val")
dropped.jsonl    rows that could not be used, each time they were passed
consumed.jsonl   with ``data.audit``: every sample of every step
events.jsonl     start, resume, first_batch, checkpoint, failure and so on, with the time of day
tensorboard/     the same scalars
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.training.events import append, event_line
from simla_ray.whole import write_whole

STEPPED = ("metrics.jsonl", "dropped.jsonl", "consumed.jsonl")


class RunLog:
    """Appends to the files of a run's folder.

    Args:
        step: resumed at this step; what an interrupted leg logged beyond it is cut off, because it will be done again.
        publish: takes {name: value} at every log point, for a dashboard.
    """

    def __init__(self, folder: Path, step: int, publish: Callable[[dict[str, float]], None] | None = None):
        self.folder, self.publish = folder, publish
        for name in STEPPED:
            _cut_after(folder / name, step)
        events = read_lines(folder / "events.jsonl")
        self.began = next((e["time"] for e in events if e["event"] == "start"), time.time())
        self.restarts = sum(e["event"] == "resume" for e in events)
        self.waiting: dict[str, str] = {}
        self.board: SummaryWriter | None = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10
        )

    def write(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines to one of the files. Where there is no room they wait in memory, and go first later."""
        text = self.waiting.pop(name, "") + "".join(json.dumps(line) + "\n" for line in lines)
        if text and not append(self.folder / name, text.encode()):
            self.waiting[name] = text

    def event(self, kind: str, **details: Any) -> None:
        self.restarts += kind == "resume"
        self.write("events.jsonl", [event_line(kind, details)])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """To TensorBoard and the dashboard."""
        try:
            for name, value in values.items():
                if self.board is not None:
                    self.board.add_scalar(name, value, step)
        except OSError as error:  # its writing thread has ended; the same figures are in metrics.jsonl
            self.board = None
            self.event("tensorboard_failed", step=step, reason=error.strerror or str(error))
        if self.publish is not None:
            self.publish(values)

    def close(self) -> None:
        """Close the files.

        Raises:
            UserError: there is still no room for some lines.
        """
        if self.board is not None:
            self.board.close()
        for name in list(self.waiting):
            self.write(name, ())
        if self.waiting:
            raise UserError(
                f"storage: no room in {self.folder} for the last lines of {', '.join(sorted(self.waiting))}"
            )


def _cut_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

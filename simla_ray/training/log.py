"""What a run writes down while it trains; rank 0 only.

metrics.jsonl    one line per step (kind "train") and per validation (kind "val")
dropped.jsonl    rows that could not be used, each time they were passed
consumed.jsonl   with ``data.audit``: every sample of every step
events.jsonl     start, resume, first_batch, checkpoint, evaluation, end, with the time of day
tensorboard/     the same scalars
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from simla_ray.jsonl import read_lines

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
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines to one of the files."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if text:
            with (self.folder / name).open("a") as file:
                file.write(text)

    def event(self, kind: str, **details: Any) -> None:
        self.write("events.jsonl", [{"time": round(time.time(), 3), "event": kind, **details}])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """To TensorBoard and the dashboard."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.publish is not None:
            self.publish(values)

    def close(self) -> None:
        self.board.close()


def _cut_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)

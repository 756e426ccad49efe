"""What the terminal shows while a run goes on: the driver reads what rank 0 writes into the run's folder."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simla_ray.report.terminal import clock, event_line, progress_line
from simla_ray.training.events import BEGINS, ENDS

SECONDS_BETWEEN_LINES = 10.0
#: As long nothing is said of workers that are to start: on a free machine they are there by then.
PATIENCE_S = 30.0


class Progress:
    """Prints a tidy line now and then from what the workers write into the run's folder, and what happened to them.

    Args:
        awaited: asked while no worker is at work: what they need to start, and what is there.
    """

    def __init__(self, folder: Path, total: int, say: Callable[[str], None], awaited: Callable[[], str]):
        self.folder, self.total, self.say, self.awaited = folder, total, say, awaited
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        metrics, events = self.folder / "metrics.jsonl", self.folder / "events.jsonl"
        offset, printed = 0, -math.inf
        seen = events.stat().st_size if events.exists() else 0
        newest: dict[str, Any] | None = None
        waiting = Waiting(time.monotonic())
        while True:
            ended = self.stop.wait(1.0)
            happened, seen = new_lines(events, seen)
            for line in filter(None, map(event_line, happened)):
                self.say(line)
            seconds = waiting.after(happened, time.monotonic())
            if seconds is not None and not ended:
                self.say(f"waiting    {clock(seconds)} for {self.awaited()}")
            lines, offset = new_lines(metrics, offset)
            newest = next((line for line in reversed(lines) if "pairs_per_s" in line), newest)
            if newest is not None and (ended or time.monotonic() - printed > SECONDS_BETWEEN_LINES):
                self.say(progress_line(newest, self.total))
                newest, printed = None, time.monotonic()
            if ended:
                return


class Waiting:
    """Tells when to say that workers have not started yet: a cluster may take minutes to find nodes for them."""

    def __init__(self, now: float):
        self.since: float | None = now
        self.said = now

    def after(self, happened: Sequence[dict[str, Any]], now: float) -> float | None:
        """Seconds that workers have been waited for, every ``PATIENCE_S``; None where there is nothing to say.

        Args:
            happened: new events of the run.
            now: seconds on a clock that only goes on.
        """
        for event in happened:
            if event["event"] in BEGINS:
                self.since = None
            elif event["event"] in ENDS:
                self.since = self.said = now
        if self.since is None or now - self.said < PATIENCE_S:
            return None
        self.said = now
        return now - self.since


def new_lines(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of a .jsonl file from ``offset`` on, and where they end.

    A file that was cut short is read from its start.
    """
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        if file.seek(0, 2) < offset:
            offset = 0
        file.seek(offset)
        whole = file.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole) + bool(whole)

"""A worker that stands still is named, and ends its process, so that the group can start again.

Collectives wait for the slowest: one worker that hangs stops all of them, and each looks the same from outside. So
every worker writes down now and then what it does and since when; whoever finds that it has not moved for too long
looks at what the others wrote, which tells who keeps them waiting.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from simla_ray.whole import write_whole

#: What a worker does between two steps, in this order.
DOING = ("waiting for data", "in the step", "at the log point")


@dataclass(frozen=True)
class Beat:
    """What a worker did last: ``since`` and ``written`` are times of day."""

    rank: int
    step: int
    doing: str
    since: float
    written: float


class Watchdog:
    """Call it with what this worker does now; with "" it does not count how long that takes.

    Args:
        folder: where the workers write their beats.
        timeout_s: how long a worker may do one thing.
        hung: called with the worker that keeps the others waiting, by the first worker that finds out.
    """

    def __init__(self, folder: Path, rank: int, world: int, timeout_s: float, hung: Callable[[Beat], None]):
        self.folder, self.rank, self.world, self.timeout_s, self.hung = folder, rank, world, timeout_s, hung
        self.now = (0, "", time.time())
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __call__(self, doing: str, step: int) -> None:
        self.now = (step, doing, time.time())

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (self.folder / "hung").unlink(missing_ok=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(min(5.0, self.timeout_s / 10)):
            step, doing, since = self.now
            self._write(Beat(self.rank, step, doing, since, time.time()))
            if doing and time.time() - since > self.timeout_s:
                self._give_up()

    def _give_up(self) -> None:
        try:
            (self.folder / "hung").touch(exist_ok=False)
        except FileExistsError:
            pass  # another worker has said it
        else:
            self.hung(culprit(self._beats(), time.time(), self.timeout_s))
        os.kill(os.getpid(), signal.SIGKILL)  # the thread that trains may wait in a collective for ever

    def _write(self, beat: Beat) -> None:
        file = self.folder / f"rank-{self.rank}.json"
        with suppress(OSError):  # no room: the next one may fit
            write_whole(file, json.dumps(asdict(beat)))

    def _beats(self) -> list[Beat]:
        found = []
        for rank in range(self.world):
            try:
                found.append(Beat(**json.loads((self.folder / f"rank-{rank}.json").read_text())))
            except (OSError, ValueError):
                continue
        return found


def culprit(beats: list[Beat], now: float, timeout_s: float) -> Beat:
    """The worker that the others wait for: one that has stopped writing, else the one that is furthest behind."""
    silent = [b for b in beats if now - b.written > timeout_s / 2]
    if silent:
        return min(silent, key=lambda b: b.written)
    return min((b for b in beats if b.doing), key=lambda b: (b.step, DOING.index(b.doing), b.since))

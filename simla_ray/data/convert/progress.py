"""What a conversion or a check says while it goes on, and the tables at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

SECONDS_BETWEEN_LINES = 5.0

Say = Callable[[str], None]


class Progress:
    """A line every few seconds: rows done, rows/s since the start, time left.

    Args:
        total: rows in all.
        before: rows that an earlier attempt has done.
        done: asked before each line; rows done so far, in all.
    """

    def __init__(self, total: int, before: int, done: Callable[[], int], say: Say):
        self.total, self.before, self.done, self.say = total, before, done, say
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.began = time.monotonic()
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.stop.wait(SECONDS_BETWEEN_LINES):
            self.say(self.line(min(self.done(), self.total), time.monotonic() - self.began))

    def line(self, done: int, seconds: float) -> str:
        rate = (done - self.before) / max(seconds, 1e-9)
        left = f"ETA {clock((self.total - done) / rate)}" if rate > 0 else "waiting for the first"
        share = 100 * done / max(1, self.total)
        return (
            f"rows       {done:>{len(f'{self.total:,}')},}/{self.total:,}  {share:3.0f} %  {rate:,.0f} rows/s  {left}"
        )


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def in_bytes(n: float) -> str:
    """With the unit that leaves one to four digits."""
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" or n >= 100 else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} TB"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as columns of one width each; columns in ``right`` are set to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

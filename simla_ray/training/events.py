"""What stands in a run's events.jsonl and stopped.json, and what follows from it.

Without torch: Ray's controller, which writes down failures, has no need of it.
"""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

from simla_ray.jsonl import read_lines
from simla_ray.whole import write_whole

#: Events with which a leg begins.
BEGINS = ("start", "resume")
#: Events that say why a leg ended, in a line.
ENDS = ("failure", "notice", "rollback", "hung")
#: Room for the last words of a run whose disk is full.
RESERVE, RESERVE_BYTES = ".reserve", 1 << 16


def log_event(folder: Path, kind: str, **details: Any) -> None:
    """A line of events.jsonl from somebody who does not keep the log."""
    append(folder / "events.jsonl", (json.dumps(event_line(kind, details)) + "\n").encode())


def event_line(kind: str, details: dict[str, Any]) -> dict[str, Any]:
    """A line of events.jsonl, of now."""
    return {"time": round(time.time(), 3), "event": kind, **details}


def append(path: Path, text: bytes) -> bool:
    """Append all of it or nothing; False where it does not fit."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, 2)
        try:
            if file.write(text) == len(text):
                return True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        file.truncate(end)
        return False


def legs_of(folder: Path) -> int:
    """Legs that the run had so far."""
    return sum(e["event"] in BEGINS for e in read_lines(folder / "events.jsonl"))


def reason(end: dict[str, Any] | None) -> str:
    """Why a leg ended, from the event that says so."""
    if end is None:
        return "the command ended"
    if end["event"] == "rollback":
        return f"no finite gradient in steps {end['first']} to {end['last']}"
    return str(end["reason"])


def failures_in_a_row(folder: Path, since: int) -> list[str]:
    """Why the last legs failed, one after the other without a new checkpoint; ``since`` leaves out earlier events."""
    found: list[str] = []
    for event in read_lines(folder / "events.jsonl")[since:]:
        if event["event"] == "checkpoint":
            found = []
        elif event["event"] in ENDS:
            found.append(reason(event))
    return found


def end_is_known(folder: Path) -> bool:
    """Whether something has already said why the last leg ends."""
    events = [e["event"] for e in read_lines(folder / "events.jsonl")]
    return next((e in ENDS for e in reversed(events) if e in (*ENDS, *BEGINS)), False)


def note_stop(folder: Path, why: str) -> None:
    """A mistake that another try would not mend: the next leg ends at once, and the driver says it."""
    for reserve in (True, False):
        try:
            write_whole(folder / "stopped.json", json.dumps({"error": why}))
            return
        except OSError:  # the disk is full: this note is what the reserve is for
            if not reserve:
                raise
            (folder / RESERVE).unlink(missing_ok=True)


def stopped(folder: Path) -> str | None:
    """What ``note_stop`` noted."""
    file = folder / "stopped.json"
    return json.loads(file.read_text())["error"] if file.exists() else None

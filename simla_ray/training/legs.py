"""Where a leg of a run begins: what the earlier ones left behind, and whether going on makes sense.

A leg is one start of the group of workers. Everything it must know lies in the run's folder, so that it does not matter
who starts it: Ray after a failure, or the user's same command another day.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.training.checkpoint import UNFINISHED, load_state, newest_and_damaged
from simla_ray.training.events import BEGINS, ENDS, RESERVE, RESERVE_BYTES, reason
from simla_ray.training.state import State

#: Seconds that the workers of an earlier leg have to end, once whoever started them is gone.
FENCE_S = 90.0


@contextmanager
def fence(folder: Path, wait_s: float = FENCE_S) -> Iterator[None]:
    """Nobody else writes into the run's folder meanwhile; waits for an earlier leg's worker to end.

    Raises:
        UserError: it does not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".writing").open("w") as file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    raise UserError(
                        f"{folder}: a worker of an earlier start still writes there after {wait_s:.0f} s; end it, or "
                        "give the run another --name"
                    ) from None
                time.sleep(0.2)
        yield


@dataclass(frozen=True)
class Leg:
    """What the workers of a leg agree on before they begin.

    Args:
        checkpoint: name of the checkpoint it begins with; None: from the start.
        complete: (name, step, score) of all complete checkpoints, oldest first.
        past: (first, last) steps without a finite gradient that are not tried again.
        events: what is to be logged, kind and details.
    """

    checkpoint: str | None
    complete: tuple[tuple[str, int, float | None], ...]
    past: tuple[tuple[int, int], ...]
    events: tuple[tuple[str, dict[str, Any]], ...]


def begin(folder: Path, world: int, changed: dict[str, Any], *, first: bool) -> Leg:
    """Look at what is there; on rank 0, behind the fence.

    Args:
        changed: operational keys that are others than in the command before.
        first: the first leg of a command.
    """
    checkpoints, events = folder / "checkpoints", read_lines(folder / "events.jsonl")
    newest, damaged = newest_and_damaged(checkpoints)
    state = load_state(newest) if newest is not None else None
    step = state.step if state is not None else 0
    legs = [i for i, e in enumerate(events) if e["event"] in BEGINS]
    said: list[tuple[str, dict[str, Any]]] = [
        ("checkpoint_damaged", {"name": path.name, "next": newest.name if newest is not None else None})
        for path in damaged
    ]
    if legs:
        ended = next((e for e in events[legs[-1] :] if e["event"] in ENDS), None)
        before = events[legs[-1]]["world_size"]
        why = reason(ended) if ended is not None or first else "the group takes another size"
        said.append(
            (
                "resume",
                {
                    "step": step,
                    "world_size": world,
                    "before": before,
                    "reason": why,
                    "changed": changed if first else {},
                }
                | _lost(folder, state),
            )
        )
    else:
        said.append(("start", {"step": step, "world_size": world}))
    return Leg(
        newest.name if newest is not None else None,
        tuple(_complete(checkpoints)),
        tuple((e["first"], e["last"]) for e in events if e["event"] == "rollback"),
        tuple(said),
    )


def tidy(checkpoints: Path) -> list[str]:
    """Remove what nobody will finish, set damaged checkpoints aside, let Ray forget what it knew, take a reserve.

    Behind the fence, before Ray starts: it refuses to when something that it knew is gone. The workers register what is
    complete anew.

    Returns:
        Names of the damaged ones.
    """
    (checkpoints.parent / RESERVE).write_bytes(bytes(RESERVE_BYTES))
    for unfinished in checkpoints.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    damaged = newest_and_damaged(checkpoints)[1]
    for folder in damaged:
        folder.rename(folder.with_name(f"damaged-{folder.name}-{int(time.time())}"))
    (checkpoints / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    return [folder.name for folder in damaged]


def _complete(checkpoints: Path) -> Iterator[tuple[str, int, float | None]]:
    found = []
    for manifest in checkpoints.glob("step-*/manifest.json"):
        try:
            state = load_state(manifest.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append((state.step, manifest.parent.name, state.score))
    for step, name, score in sorted(found, key=lambda f: f[:2]):
        yield name, step, score


def _lost(folder: Path, state: State | None) -> dict[str, Any]:
    """Work that must be done again, and the time since the last sign of life."""
    metrics = folder / "metrics.jsonl"
    lines = [line for line in read_lines(metrics) if "seconds" in line]
    step, seconds = (state.step, state.seconds) if state is not None else (0, 0.0)
    found: dict[str, Any] = {"lost_steps": 0, "lost_s": 0.0}
    if lines and lines[-1]["step"] > step:
        found = {"lost_steps": lines[-1]["step"] - step, "lost_s": round(lines[-1]["seconds"] - seconds, 2)}
    if metrics.exists():
        found["down_s"] = round(time.time() - metrics.stat().st_mtime, 2)
    return found

"""CPUs and GPUs that are reserved for nobody, given back while the runs of a sweep or a comparison go on.

Ray Train reserves a placement group for its workers, and its own cleaner hears of it only when they have started. A
controller that dies before that leaves a group which Ray keeps until the job ends: in a single run at once, in a
sweep after hours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

#: Seconds for which nobody must have used any of a group; workers take theirs as soon as the group is there.
UNUSED_S = 60.0
#: Seconds between two looks.
LOOK_S = 10.0


@contextmanager
def reclaiming(say: Callable[[str], None], kept: dict[str, float]) -> Iterator[None]:
    """Look from time to time, and give back what this job has reserved and does not use.

    Args:
        kept: resources of groups that others reserve and use from time to time (Tune's, for the drivers of trials).
    """
    stop = threading.Event()

    def look() -> None:
        since: dict[str, float] = {}
        while not stop.wait(LOOK_S):
            for group, resources in reclaim(since, kept, time.monotonic()).items():
                amounts = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
                say(f"reclaimed  {amounts}: reserved for workers whose run had ended ({group})")

    thread = threading.Thread(target=look, name="reclaiming", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def reclaim(since: dict[str, float], kept: dict[str, float], now: float) -> dict[str, dict[str, float]]:
    """Remove this job's placement groups of which nothing was in use for ``UNUSED_S``.

    Args:
        since: group -> when it was first seen unused, seconds; kept up to date here.
        now: of the same clock.

    Returns:
        Group -> the resources that were reserved.
    """
    unused = {group: total for group, total in _unused(ray.get_runtime_context().get_job_id()) if total != kept}
    for group in [group for group in since if group not in unused]:
        del since[group]
    removed = {}
    for group, total in unused.items():
        if now - since.setdefault(group, now) >= UNUSED_S:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
            removed[group] = total
    return removed


def _unused(job: str) -> Iterator[tuple[str, dict[str, float]]]:
    """(id, resources) of the job's groups that are reserved, and of which all is free."""
    table: dict[str, dict[str, Any]] = placement_group_table()
    reserved = [group for group, state in table.items() if state["state"] == "CREATED" and group.endswith(job)]
    if not reserved:
        return
    free = ray.available_resources()
    for group in reserved:
        total: dict[str, float] = {}
        for bundle in table[group]["bundles"].values():
            for name, amount in bundle.items():
                total[name] = total.get(name, 0.0) + amount
        if all(free.get(f"{name}_group_{group}", 0.0) >= amount for name, amount in total.items()):
            yield group, total

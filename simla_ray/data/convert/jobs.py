"""A Ray of our own or somebody's, a job on it, and what went wrong in it as one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simla_ray.data import pipeline
from simla_ray.errors import UserError

#: What Ray Data puts behind the message of an error in a task.
RAY_DATA_ADDS = "\nFailed to apply UDF transform"


def join(address: str | None, tasks: int | None) -> int:
    """Join the cluster at an address, else at RAY_ADDRESS, or start a Ray of this process.

    Returns:
        How many tasks run at the same time: ``tasks``, else as many as there are CPUs.

    Raises:
        UserError: no cluster at the address.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    try:
        pipeline.connect(address, tasks or 1)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        raise UserError(f"--address: no cluster at {address} ({str(error).splitlines()[0]})") from None
    pipeline.quiet()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a task's mistake is told once, in plain words
    return tasks or max(1, int(ray.cluster_resources().get("CPU", 1)))


def run_job(
    items: Sequence[Mapping[str, Any]], work: pipeline.Work, tasks: int, loads_model: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """``pipeline.job``, with a task's ``UserError`` raised as such."""
    try:
        yield from pipeline.job(items, work, min(tasks, len(items)), loads_model)
    except Exception as error:
        mistake = _mistake_in(error)
        if mistake is None:
            raise
        raise UserError(mistake) from None


def _mistake_in(error: BaseException | None) -> str | None:
    """Ray wraps what a task raises, and gives the wrapper the type and a traceback as its text."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "cause", None)
        if isinstance(error, UserError) and inner is None:
            return str(error).partition(RAY_DATA_ADDS)[0]
        error = inner or error.__cause__ or error.__context__
    return None

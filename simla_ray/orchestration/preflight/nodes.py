"""The nodes of a cluster, each asked by a small Ray task; a node that hangs is named and not waited for."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from simla_ray.config.schema import Run
from simla_ray.orchestration.preflight.probes import Answers, File, Questions, clock, existing, look, short
from simla_ray.orchestration.preflight.trial import Trial, try_step

#: Longest wait for a node's answer: a cold worker process of a busy machine needs up to half of it.
ANSWER_S = 60.0
#: For a step on a GPU, with the model's making and CUDA's start.
TRIAL_S = 120.0
#: For the time, from a process that has just answered.
CLOCK_S = 10.0
#: Network file systems show a file of another machine a little later.
SEEN_WITHIN_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """What Ray says of a node, and what it answered.

    Args:
        silence: why there are no answers.
        ahead_s: least seconds by which its clock must differ from the driver's, negative where it is behind.
    """

    name: str
    cpus: float
    gpus: float
    object_store: int
    id: str = ""
    answers: Answers | None = None
    silence: str = ""
    ahead_s: float = 0.0


def ray_nodes() -> list[Node]:
    """The nodes that are alive, not asked yet; named by address, and two of one address by their ids, too."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    found = []
    for node, address in zip(alive, addresses, strict=True):
        has, number = node["Resources"], node["NodeID"]
        name = address if addresses.count(address) == 1 else f"{address} ({number[:6]})"
        store = int(has.get("object_store_memory", 0))
        found.append(Node(name, has.get("CPU", 0), has.get("GPU", 0), store, number))
    return found


@contextmanager
def marked(storage: Path, files: tuple[File, ...], packages: tuple[str, ...]) -> Iterator[Questions]:
    """Questions about a storage in which a marker folder lies meanwhile; where it does not exist yet, above it."""
    token = secrets.token_hex(8)
    marker, problem = existing(storage) / f".preflight-{token}", ""
    try:
        marker.mkdir()
        (marker / "driver").write_text(token)
    except OSError as error:
        problem = f"not writable: {short(error)}"
    try:
        yield Questions(marker, token, files, packages, problem)
    finally:
        shutil.rmtree(marker, ignore_errors=True)


def ask(nodes: Sequence[Node], questions: Questions) -> list[Node]:
    """The nodes with their answers, and with what their clocks say."""
    answers = _on_each(nodes, look, ANSWER_S, lambda node: (questions, node.id))
    deadline = time.monotonic() + SEEN_WITHIN_S
    asked = [_answered(node, answer, questions, deadline) for node, answer in zip(nodes, answers, strict=True)]
    heard = [node for node in asked if node.answers is not None]
    ahead = dict(zip((node.id for node in heard), _clocks(heard), strict=True))
    return [replace(node, ahead_s=ahead.get(node.id, 0.0)) for node in asked]


def try_gpus(nodes: Sequence[Node], run: Run) -> dict[str, Trial]:
    """The trial of a step on one GPU of each node that has some; by the node's name."""
    able = [node for node in nodes if node.gpus >= 1 and not node.silence]
    found = _on_each(able, try_step, TRIAL_S, lambda node: (run, "cuda"), num_gpus=1)
    return {
        node.name: trial if isinstance(trial, Trial) else Trial(problem=trial)
        for node, trial in zip(able, found, strict=True)
    }


def _answered(node: Node, answer: Answers | str, questions: Questions, deadline: float) -> Node:
    if isinstance(answer, str):
        return replace(node, silence=answer)
    if not answer.storage_problem and not _seen(questions.marker / node.id, questions.token, deadline):
        answer = replace(answer, storage_problem="what it writes there is not seen by the driver")
    return replace(node, answers=answer)


def _seen(file: Path, token: str, deadline: float) -> bool:
    while True:
        try:
            if file.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _clocks(nodes: Sequence[Node]) -> list[float]:
    """How far each node's clock is ahead at least: it was read between the sending of the task and its answer."""
    found = []
    for node in nodes:  # one by one: the shorter the round trip, the sharper
        sent = time.time()
        (read,) = _on_each([node], clock, CLOCK_S, lambda node: ())
        received = time.time()
        found.append(0.0 if isinstance(read, str) else max(read - received, 0.0) + min(read - sent, 0.0))
    return found


def _on_each(
    nodes: Sequence[Node],
    function: Callable[..., T],
    wait_s: float,
    arguments: Callable[[Node], tuple[Any, ...]],
    num_gpus: int = 0,
) -> list[T | str]:
    """Run a function on every node at the same time; its value, or why there is none."""
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(function)
    running = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*arguments(node))
        for node in nodes
    ]
    done = set(ray.wait(running, num_returns=len(running), timeout=wait_s)[0]) if running else set()
    found: list[T | str] = []
    for one in running:
        if one not in done:
            ray.cancel(one, force=True)
            found.append(f"no answer within {wait_s:.0f} s")
            continue
        try:
            found.append(ray.get(one))
        except Exception as error:  # of the node, whatever it is: it becomes a line of the report
            found.append(short(error))
    return found

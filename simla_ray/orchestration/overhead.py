"""What the training loop inside Ray Train adds to a step.

One Ray Train worker alternates blocks of bare steps and of a run's own loop: the same step on the same prepared batch,
on top of it ``Loop`` with what a run's rank 0 does at its log points (lines, TensorBoard, gauges), and a report to Ray
Train at the end of each block, far more often than a run reports. Reading data and writing checkpoints are left out:
what they cost depends on data and storage, and a run logs it.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig

from simla_ray.config.schema import Device, Run
from simla_ray.data import pipeline
from simla_ray.data.cursor import Cursor
from simla_ray.data.order import Order, Position
from simla_ray.data.packing import Packed
from simla_ray.errors import UserError
from simla_ray.orchestration import cluster as clusters
from simla_ray.orchestration.launch import WORKER_ENV
from simla_ray.orchestration.preflight.capacity import room
from simla_ray.orchestration.preflight.checks import require
from simla_ray.orchestration.preflight.nodes import ray_nodes
from simla_ray.orchestration.worker import metrics_publisher
from simla_ray.training.comm import Comm
from simla_ray.training.contenders import SHAPES, Workshop
from simla_ray.training.log import RunLog
from simla_ray.training.loop import Loop
from simla_ray.training.saver import Saved, Saver
from simla_ray.training.speed import Plan
from simla_ray.training.state import State
from simla_ray.training.step import Step

BLOCK_STEPS = 10
LEAST_STEP_S = 0.1
MOST_PAIRS = 4096


def measure_overhead(device: Device, rounds: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Start a worker, and compare.

    Returns:
        ``overhead``: median over rounds of the loop's wall seconds over the bare ones, minus one; the same in CPU
        seconds; quartiles; seconds per step of both.

    Raises:
        UserError: no such device, or a cluster too small for one worker.
    """
    if not 1 <= rounds <= 1000:
        raise UserError(f"--rounds: {rounds} is not in 1..1000")
    shape = "base" if device is Device.gpu or (device is Device.auto and torch.cuda.is_available()) else "tiny"
    workshop = Plan(shape=shape, device=device).workshop()[1]
    run = _with(workshop.run(), ray={"device": device, "cpus_per_worker": 1.0}, data={"decode_cpus": 1})
    cluster = clusters.join(run)
    say(cluster.line())
    require(room(run, ray_nodes(), workshop.gpu))
    pipeline.quiet()
    say(f"alternate  {BLOCK_STEPS} bare steps and {BLOCK_STEPS} of a run's loop, {rounds} rounds after one to warm up")
    with tempfile.TemporaryDirectory(prefix="simla-ray-") as storage:
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"shape": shape, "rows": workshop.rows, "rounds": rounds},
            scaling_config=ScalingConfig(
                num_workers=1,
                use_gpu=workshop.gpu,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if workshop.gpu else {})},
            ),
            run_config=RunConfig(storage_path=storage, name="overhead", worker_runtime_env={"env_vars": WORKER_ENV}),
        )
        return trainer.fit().return_value


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """The train function: what ``train_worker`` sets up, around a stream that alternates."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    workshop, step, batch = _long_enough(config["shape"], config["rows"], device)
    run = _with(workshop.run(), checkpoint={"every_steps": BLOCK_STEPS}, eval={"best": "last", "every_steps": 10**9})
    step.total = (config["rounds"] + 1) * BLOCK_STEPS + 1  # the step after the last block ends the loop
    alternating = _Alternating(step, Packed(batch, 0, Position()), config["rounds"] + 1)
    comm = Comm()

    with tempfile.TemporaryDirectory(prefix="simla-ray-") as folder:
        log = RunLog(Path(folder), 0, metrics_publisher("benchmark"))
        state = State(0, Cursor.start(run.micro_batches))
        order = Order((10**9,), run.micro_batches, 1, run.seed)
        Loop(run, step, state, order, comm, log, dict, _Reported(), _report, {})(iter(alternating))
        log.close()
    return alternating.result(run)


class _Reported(Saver):
    """In place of checkpoints, whose cost depends on the disk: only what Ray is told of them."""

    def __init__(self) -> None:
        self.written = []

    def __call__(self, state: State) -> None:
        self.written.append(Saved("", state.step, state.score, 0.0, 0.0))

    def finished(self, *, wait: bool = False) -> list[Saved]:
        found, self.written = self.written, []
        return found


def _report(saved: Saved) -> None:
    ray.train.report({"step": saved.step})


def _long_enough(shape: str, rows: int, device: torch.device) -> tuple[Workshop, Step, Any]:
    """A step of at least 100 ms: with the shape's batch, or one that is doubled until it takes so long."""
    while True:
        workshop = Workshop(SHAPES[shape], device, rows)
        run = workshop.run()
        batch = workshop.batch(run)
        step = workshop.ours(run, batch).step
        for number in range(2):  # the first one warms up
            began = _now(device)
            step(number, [(0, batch.to(device))])
            took = _now(device) - began
        if took >= 1.2 * LEAST_STEP_S or rows >= MOST_PAIRS:
            return workshop, step, batch  # type: ignore[return-value]
        rows *= 2


@dataclass
class _Alternating:
    """The loop's stream. Between blocks it makes bare steps itself, and reads the clocks."""

    step: Step
    packed: Packed
    rounds: int
    bare: list[tuple[float, float]] = field(default_factory=list)  # (wall, CPU) seconds of a block; one more than loop
    loop: list[tuple[float, float]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Packed]:
        for _ in range(self.rounds):
            self.bare.append(self._bare_block())
            began = self._clocks()
            for _ in range(BLOCK_STEPS):
                yield self.packed
            self.loop.append(_since(began, self._clocks()))  # the loop asks for more: log point and report are done
        self.bare.append(self._bare_block())
        yield self.packed

    def _bare_block(self) -> tuple[float, float]:
        began = self._clocks()
        for number in range(BLOCK_STEPS):
            self.step(number, [(0, self.packed.batch.to(self.step.device))])
        return _since(began, self._clocks())

    def _clocks(self) -> tuple[float, float]:
        return _now(self.step.device), time.process_time()

    def result(self, run: Run) -> dict[str, Any]:
        """The first round is left out. A block of the loop is held against the bare ones before and after it."""
        around = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in zip(self.bare, self.bare[1:], strict=False)]
        pairs = list(zip(self.loop, around, strict=True))[1:]
        wall, cpu = ([loop[i] / bare[i] - 1 for loop, bare in pairs] for i in (0, 1))
        return {
            "overhead": statistics.median(wall),
            "overhead_range": _quartiles(wall),
            "cpu_overhead": statistics.median(cpu),
            "cpu_overhead_range": _quartiles(cpu),
            "rounds": len(pairs),
            "steps_per_block": BLOCK_STEPS,
            "bare": _per_step([bare for _, bare in pairs]),
            "ray_train": _per_step([loop for loop, _ in pairs]),
            "setting": {
                "device": self.step.device.type,
                "label": run.label,
                "batch": run.batch.global_,
                "log_every_steps": run.log.every_steps,
                "report_every_steps": run.checkpoint.every_steps,
            },
        }


def _per_step(blocks: list[tuple[float, float]]) -> dict[str, Any]:
    wall = [seconds / BLOCK_STEPS for seconds, _ in blocks]
    return {
        "seconds_per_step": statistics.median(wall),
        "seconds_range": [min(wall), max(wall)],
        "cpu_seconds_per_step": statistics.median(seconds / BLOCK_STEPS for _, seconds in blocks),
    }


def _quartiles(values: list[float]) -> list[float]:
    """First and third; of a single value, that value."""
    if len(values) == 1:
        return values * 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _since(began: tuple[float, float], now: tuple[float, float]) -> tuple[float, float]:
    return now[0] - began[0], now[1] - began[1]


def _with(run: Run, **sections: dict[str, Any]) -> Run:
    """The run with keys of some sections changed."""
    return run.model_copy(update={name: getattr(run, name).model_copy(update=keys) for name, keys in sections.items()})

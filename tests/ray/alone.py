"""A run in this process: prepared and streamed as ever, trained by the same loop, but by no workers of Ray Train."""

from pathlib import Path

import torch

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.cursor import Cursor
from simla_ray.data.prefetch import Prefetched
from simla_ray.jsonl import read_lines
from simla_ray.orchestration.plan import total_steps
from simla_ray.orchestration.prepare import prepare
from simla_ray.orchestration.worker import _stream, build_losses
from simla_ray.training.comm import Comm
from simla_ray.training.log import RunLog
from simla_ray.training.loop import Loop
from simla_ray.training.state import State
from simla_ray.training.step import Step


def losses_alone(run: Run, prepared_in: Path, folder: Path) -> list[dict[str, float]]:
    """Losses of every step with one worker.

    Args:
        run: that was checked.
        prepared_in: ``prepared`` of a run, made where it is not there.
        folder: for the log.
    """
    pipeline.quiet()
    cpu, comm = torch.device("cpu"), Comm()
    prepared = prepare(run, prepared_in, 1)
    order = pipeline.order_of(run, prepared.indexes["train"])
    total = total_steps(run, order, None)
    step = Step(run, build_losses(run, prepared, cpu), total, comm, cpu)
    folder.mkdir()
    log, start = RunLog(folder, 0), State(0, Cursor.start(order.lanes))
    loop = Loop(run, step, start, order, comm, log, lambda: {run.eval.best: 0.0}, None, lambda saved: None, {})
    with Prefetched(_stream(run, prepared, start.cursor, total, comm, cpu), 2) as stream:
        loop(stream)
    log.close()
    return losses_of(folder)


def losses_of(folder: Path) -> list[dict[str, float]]:
    """Losses of every step of a run's folder, none of them missing."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["losses"] for line in lines]

"""Checkpoints beside the training: the step waits for a copy of its state, a thread writes it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from simla_ray.config.schema import Run
from simla_ray.models.model import Model
from simla_ray.training.checkpoint import Snapshot
from simla_ray.training.state import State


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written, or could not be.

    Args:
        folder: its name under the run's ``checkpoints``.
        score: what retention goes by; None: made without a validation.
        blocked_s: seconds the step waited; ``seconds`` until it was complete.
        error: why it could not be written; None: it is complete.
    """

    folder: str
    step: int
    score: float | None
    blocked_s: float
    seconds: float
    error: str | None = None


class Saver:
    """Writes one checkpoint at a time; the next one waits for it. On rank 0 only.

    Args:
        checkpoints: folder of the run's checkpoints.
        prepared: folder of vocabulary and codes, which go into each checkpoint.
    """

    def __init__(
        self, checkpoints: Path, run: Run, model: Model, optimizer: torch.optim.Optimizer, prepared: Path
    ) -> None:
        self.checkpoints, self.run, self.model, self.optimizer = checkpoints, run, model, optimizer
        self.prepared = prepared
        self.snapshot = Snapshot(model, optimizer)
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[Saved] | None = None
        self.written: list[Saved] = []

    def __call__(self, state: State) -> None:
        """Begin a checkpoint of this moment."""
        began = time.perf_counter()
        self._collect(wait=True)
        self.snapshot.take(self.run, self.model, self.optimizer, state)
        self.writing = self.thread.submit(self._write, state.step, state.score, began, time.perf_counter() - began)

    def finished(self, *, wait: bool = False) -> list[Saved]:
        """The checkpoints that were finished since this was last asked; all of them with ``wait``."""
        self._collect(wait)
        found, self.written = self.written, []
        return found

    def _collect(self, wait: bool) -> None:
        if self.writing is not None and (wait or self.writing.done()):
            self.written.append(self.writing.result())
            self.writing = None

    def _write(self, step: int, score: float | None, began: float, blocked: float) -> Saved:
        folder = self._free_name(step)
        try:
            self.snapshot.write(folder, self.prepared)
        except OSError as error:
            return Saved(folder.name, step, score, blocked, time.perf_counter() - began, error.strerror or str(error))
        return Saved(folder.name, step, score, blocked, time.perf_counter() - began)

    def _free_name(self, step: int) -> Path:
        """A damaged checkpoint of this step may still be there, and Ray's retention may know it."""
        name, again = f"step-{step:08d}", 1
        while (self.checkpoints / name).exists():
            again += 1
            name = f"step-{step:08d}-{again}"
        return self.checkpoints / name

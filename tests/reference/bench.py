"""The unfused step and the undone savings, as ``experiments/benchmark.py`` hands them to the library."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from simla_ray.config.schema import Run, TeacherMode
from simla_ray.models.forward import Negatives
from simla_ray.models.model import Model
from simla_ray.training.measure import CLS_ID
from simla_ray.types import Batch
from tests.reference import losses
from tests.reference.step import UnfusedStep
from tests.reference.unfused import Unfused
from tests.reference.without import SAVINGS


class PlainReference:
    """A ``Reference`` of ``simla_ray.training.contenders``."""

    savings = SAVINGS

    def step(self, run: Run, model: Model, total_steps: int, device: torch.device, *, fast: bool) -> UnfusedStep:
        """One optimiser step; ``fast`` under bfloat16 autocast and with fused attention.

        The teacher keeps its dropout on, as the official one does.
        """
        if model.teacher is not None:
            model.teacher.mode = TeacherMode.train
            model.train()
        return UnfusedStep(run, Unfused(run, model, None, CLS_ID, sdpa=fast), total_steps, device, autocast=fast)

    def total(self, run: Run, model: Model, batch: Batch) -> Tensor:
        """The loss on the meta device.

        What is drawn and picked there would follow from values, which there are none of: negatives are given, and all
        rows stay. No product reads those that would not.
        """
        on, other = run.objectives.active(), torch.arange(len(batch)).roll(1)
        with mock.patch.object(losses, "pick", lambda x, chosen: x.flatten(0, 1)):
            total, _ = Unfused(run, model, None, CLS_ID).losses(
                batch, set(on), dict.fromkeys(on, 0.4), given=Negatives(other, other)
            )
        return total

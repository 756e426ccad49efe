"""The EMA teacher: a float32 master, and a copy in the precision its passes run in."""

from __future__ import annotations

import copy

import torch
from torch import nn

from simla_ray.config.schema import TeacherMode


class Teacher(nn.Module):
    """Exponential moving average of the student's towers (official ``_momentum_update``): m * teacher + (1 - m) *
    student.

    The average is kept in float32: a bfloat16 average at m = 0.995 would stall. The towers that run are the master
    itself, or a copy in a lower precision, so that autocast has nothing to cast in the passes.
    """

    def __init__(self, student: nn.Module, m: float, mode: TeacherMode, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.m, self.mode = m, mode
        self.master = copy.deepcopy(student).requires_grad_(False)
        self.low = copy.deepcopy(self.master) if dtype != torch.float32 else None
        if self.low is not None:  # parameters only: rounding the pixel statistics would shift every image
            for parameter in self.low.parameters():
                parameter.data = parameter.data.to(dtype)
        self.train(student.training)

    @property
    def towers(self) -> nn.Module:
        return self.low if self.low is not None else self.master

    def train(self, mode: bool = True) -> Teacher:
        super().train(mode and self.mode is TeacherMode.train)
        return self

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards the student, in place, once per optimiser step and before the teacher's passes."""
        masters = list(self.master.parameters())
        torch._foreach_lerp_(masters, list(student.parameters()), 1 - self.m)
        self.refresh()

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Start anew from the student's weights."""
        self.master.load_state_dict(student.state_dict())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the low-precision copy up to date with the master, as after loading a checkpoint."""
        if self.low is not None:
            torch._foreach_copy_(list(self.low.parameters()), list(self.master.parameters()))

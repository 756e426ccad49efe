"""An optimiser step around ``Unfused``: EMA, backward, clipping, AdamW and queue as the official code has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from simla_ray.config.schema import Run
from simla_ray.models.model import Model
from simla_ray.objectives.terms import itm_eps_at
from simla_ray.training.optim import build_optimizer, learning_rate, named_parameters
from simla_ray.training.step import active_at, alphas_at, step_seed
from simla_ray.types import Batch
from tests.reference.unfused import Unfused


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, m: float) -> None:
    """EMA with a new tensor for every product and every sum."""
    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
        own.data = own.data * m + other.data * (1.0 - m)


class UnfusedStep:
    """One optimiser step. ``autocast`` runs the passes under bfloat16 autocast, as a user of that code would.

    Only the float32 master of the teacher moves, not the low-precision copy that our step may keep beside it.
    """

    def __init__(self, run: Run, unfused: Unfused, total_steps: int, device: torch.device, autocast: bool = False):
        self.run, self.unfused, self.total, self.device = run, unfused, total_steps, device
        self.model, self.autocast = unfused.model, autocast
        self.parameters = [p.requires_grad_(True) for _, p in named_parameters(self.model)]
        groups = build_optimizer(self.model, run.optim).param_groups  # ours only says what is decayed
        groups = [{name: g[name] for name in ("params", "weight_decay", "factor")} for g in groups]
        optim = run.optim
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def __call__(self, step: int, batches: list[tuple[int, Batch]]) -> dict[str, float]:
        """Numbered micro-batches in; total, losses (means over the micro-batches) and ``grad_norm`` out."""
        if len(batches) > 1 and getattr(self.run.objectives.itc, "scope", "micro") != "micro":
            raise NotImplementedError("objectives.itc.scope: the reference contrasts pairs of one micro-batch")
        run, model, progress = self.run, self.model, step / self.total
        active, alphas = active_at(run, step, self.total), alphas_at(run, progress)
        clamp_temperature(model)
        if model.teacher is not None:
            move_teacher(model.teacher.master, model.student, model.teacher.m)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, self.total, run.optim)
        out: dict[str, float] = {}
        keys = []
        for number, batch in batches:
            torch.manual_seed(step_seed(run.seed, step, number))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                eps = itm_eps_at(run.objectives.itm, progress)
                total, found = self.unfused.losses(batch, active, alphas, itm_eps=eps)
            (total / len(batches)).backward()
            for name, loss in {"total": total, **found}.items():
                out[name] = out.get(name, 0.0) + loss.item() / len(batches)
            if self.unfused.image_key is not None:
                keys.append((self.unfused.image_key.detach(), self.unfused.text_key.detach(), batch.image_id))
        out["grad_norm"] = self._update()
        if model.queue is not None and keys:
            write_queue(model.queue, keys, step * run.batch.global_ % len(model.queue.ids))
        return out

    def _update(self) -> float:
        """The norm is read parameter by parameter; a gradient that is not finite changes nothing."""
        reached = [p for p in self.parameters if p.grad is not None]
        norm = math.sqrt(sum(p.grad.norm().item() ** 2 for p in reached))
        if math.isfinite(norm):
            if self.run.optim.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    reached, self.run.optim.clip, torch.tensor(norm, dtype=reached[0].dtype)
                )
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def clamp_temperature(model: Model) -> None:
    """At the start of every step."""
    model.scale.clamp() if hasattr(model, "scale") else model.clamp_temperature()


@torch.no_grad()
def write_queue(queue: nn.Module, keys: list[tuple[Tensor, Tensor, Tensor]], at: int) -> None:
    """Keys and image ids of all micro-batches, from row ``at`` on."""
    for own, new in zip((queue.image, queue.text, queue.ids), zip(*keys, strict=True), strict=True):
        new = torch.cat(new)
        own[at : at + len(new)] = new

"""THE step: micro-batches in, one optimiser update out, without waiting for the device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simla_ray.config.enums import ContrastScope
from simla_ray.config.schema import Distilled, Run, ScheduleKind
from simla_ray.models.compiling import compile_layers
from simla_ray.models.family import forward
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.precision import autocast
from simla_ray.objectives.terms import alpha_at, itm_eps_at, loss_terms
from simla_ray.training.comm import Comm
from simla_ray.training.optim import build_optimizer, learning_rate
from simla_ray.training.whole_step import Vectors, backward_over_step
from simla_ray.types import Batch, LossTerm

#: Objectives that read another's pass: where one objective is drawn for a step, they come with it.
RIDES = {"wpa": "itm"}


class Losses(nn.Module):
    """Forward and losses of one micro-batch; the module that DistributedDataParallel wraps."""

    def __init__(
        self, run: Run, model: Model, tokenizer: nn.Module | None, cls_id: int, keyword_columns: Tensor | None
    ):
        super().__init__()
        self.run, self.model, self.cls_id = run, model, cls_id
        self.tokenizer = tokenizer
        self.register_buffer("keyword_columns", keyword_columns, persistent=False)

    def forward(
        self, batch: Batch, active: set[str], alphas: dict[str, float], itm_eps: float
    ) -> tuple[Tensor, dict[str, LossTerm], Tensor | None, Tensor | None]:
        """-> weighted total, the terms, and the (B, E) image and text keys that enter the queue."""
        objectives = self.run.objectives
        needs = Needs.of(objectives, active, has_teacher=self.model.teacher is not None)
        record = forward(self.model, batch, objectives, needs, itm_eps=itm_eps)
        terms = loss_terms(
            record,
            batch,
            objectives,
            active,
            alphas,
            scale=self.model.scale,
            queue=self.model.queue,
            codes=self._codes(batch) if "mim" in active else None,
            cls_id=self.cls_id,
            keyword_columns=self.keyword_columns,
        )
        weights = {name: getattr(objectives, name).weight for name in terms}
        total = torch.stack([weights[name] * term.loss for name, term in terms.items()]).sum()
        return total, terms, record.image_key, record.text_key

    def _codes(self, batch: Batch) -> Tensor:
        """(C, P) visual codes of the masked pictures."""
        if batch.codes is not None:
            return batch.codes
        assert self.tokenizer is not None
        picture = batch.code_image if batch.code_image is not None else batch.image[: len(batch.patch_mask)]
        return self.tokenizer(picture)


@dataclass(frozen=True)
class StepOutput:
    """Scalars of a step, still on the device: sums over this worker's micro-batches, and the global gradient norm."""

    sums: dict[str, Tensor]
    grad_norm: Tensor  # not finite: nothing was updated


class Step:
    """Holds the optimiser and the phase; call it once per optimiser step.

    The micro-batch is the unit of meaning: random draws derive from (seed, step, micro-batch), gradients average over
    all micro-batches of the step, and the queue takes their keys in order. Workers only decide who computes what.
    """

    def __init__(self, run: Run, losses: Losses, total_steps: int, comm: Comm, device: torch.device):
        self.run, self.losses, self.total, self.comm, self.device = run, losses, total_steps, comm, device
        self.model = losses.model
        self.optimizer = build_optimizer(self.model, run.optim)
        if run.compile:
            compile_layers(self.model)
        self.active: set[str] = set()
        itc = run.objectives.itc
        over_step = itc is not None and itc.scope is ContrastScope.step
        self.module: nn.Module = Vectors(losses.model) if over_step else losses
        self.wrapped = self.module

    def __call__(self, step: int, batches: list[tuple[int, Batch]]) -> StepOutput:
        """One update.

        Args:
            batches: (number of the micro-batch in the step, micro-batch) of this worker, on the device.
        """
        run, model = self.run, self.model
        self._enter_phase(active_at(run, step, self.total))
        if model.scale is not None:
            model.scale.clamp()
        if model.teacher is not None:
            model.teacher.update(model.student)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, self.total, run.optim)

        if isinstance(self.module, Vectors):
            sums, keys = self._backward_over_step(step, batches), []
        else:
            sums, keys = self._backward(step, batches)
        norm = self._update()
        if model.queue is not None and keys:
            self._write_queue(step, keys)
        return StepOutput(sums, norm)

    def _backward(
        self, step: int, batches: list[tuple[int, Batch]]
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
        """Gradients of all micro-batches; -> sums of their scalars, and image keys, text keys, image ids of each."""
        run, progress = self.run, step / self.total
        alphas, eps = alphas_at(run, progress), itm_eps_at(run.objectives.itm, progress)
        # DistributedDataParallel takes the mean over workers, of which some have a micro-batch more than others.
        share = run.micro_batches / self.comm.world
        sums: dict[str, Tensor] = {}
        keys: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, (number, batch) in enumerate(batches):
            torch.manual_seed(step_seed(run.seed, step, number))
            last = i == len(batches) - 1
            waits = isinstance(self.wrapped, DistributedDataParallel) and not last
            with self.wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with autocast(run, self.device):
                    total, terms, image_key, text_key = self.wrapped(batch, self.active, alphas, eps)
                (total / share).backward()
            _add(sums, total.detach(), terms)
            if image_key is not None and text_key is not None:
                keys.append((image_key.detach(), text_key.detach(), batch.image_id))
        return sums, keys

    def _backward_over_step(self, step: int, batches: list[tuple[int, Batch]]) -> dict[str, Tensor]:
        itc = self.run.objectives.itc
        assert itc is not None
        seeded = [(step_seed(self.run.seed, step, number), batch) for number, batch in batches]
        term = backward_over_step(self.run, self.wrapped, self.model, seeded, self.comm)
        sums: dict[str, Tensor] = {}
        for _ in batches:
            _add(sums, itc.weight * term.loss.detach(), {"itc": term})
        return sums

    def _update(self) -> Tensor:
        """Clip and apply; a non-finite gradient is left out by the optimiser itself, on the device."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # AdamW's own switches for gradient scaling: it divides the gradients as it reads them, which spares clipping a
        # pass over all of them, and with found_inf set parameters, moments and counters stay as they are.
        clip = self.run.optim.clip
        scale = ((norm + 1e-6) / clip).clamp(min=1.0).float() if clip is not None else None
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~norm.isfinite()).float().to(self.device)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _write_queue(self, step: int, keys: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """All micro-batches' keys, in the order of the step: worker r holds numbers r, r + W, ..."""
        queue, total = self.model.queue, self.run.batch.global_
        assert queue is not None

        def in_order(i: int) -> Tensor:
            return self.comm.in_turns(torch.stack([k[i] for k in keys]), self.run.micro_batches).flatten(0, 1)

        queue.write(in_order(0), in_order(1), in_order(2), step * total % len(queue.ids))

    def _enter_phase(self, active: set[str]) -> None:
        """Let what these objectives reach train, and wrap the module anew where that changes.

        Where one objective is drawn a step, what any of them reaches trains all the time, and one wrapper serves all
        steps: it looks which parameters a step has used, and the others keep no gradient, as with one worker. All
        workers draw the same objective, so they agree on it.
        """
        if active == self.active:
            return
        began, self.active = bool(self.active), active
        sampled = self.run.schedule.kind is ScheduleKind.sampled
        if sampled and began:
            return
        self.model.trainable_in(set(self.run.objectives.active()) if sampled else active)
        if self.comm.world > 1:
            self.wrapped = self.module  # drop the old reducer's hooks before the new one registers its own
            self.wrapped = DistributedDataParallel(
                self.module,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                forward_sync_buffers=False,
                find_unused_parameters=sampled,
            )


def active_at(run: Run, step: int, total: int) -> set[str]:
    """Objectives of a step: all of them, those of its phase, or the one drawn from (seed, step)."""
    on = list(run.objectives.active())
    psl = run.objectives.psl
    if psl is not None and step < psl.start_step and len(on) > 1:
        on = [name for name in on if name != "psl"]
    if run.schedule.kind is ScheduleKind.phases:
        phase = next(p for p in run.schedule.phases if step < round(p.until * total) or p.until == 1.0)
        on = [name for name in on if name in phase.objectives]
    elif run.schedule.kind is ScheduleKind.sampled:
        drawn = [name for name in on if RIDES.get(name) not in on]
        weights = np.array([run.schedule.mix.get(name, 1.0) for name in drawn])  # type: ignore[call-overload]
        rng = np.random.default_rng([run.seed, 5, step])
        chosen = drawn[int(rng.choice(len(drawn), p=weights / weights.sum()))]
        on = [chosen, *(name for name in on if RIDES.get(name) == chosen)]
    return set(on)


def alphas_at(run: Run, progress: float) -> dict[str, float]:
    """Share of the soft target of every objective that has one."""
    on = run.objectives.active()
    return {name: alpha_at(o, progress) for name, o in on.items() if isinstance(o, Distilled)}


def step_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of dropout and ITM's draws."""
    return int(np.random.SeedSequence([seed, 3, step, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def _add(sums: dict[str, Tensor], total: Tensor, terms: dict[str, LossTerm]) -> None:
    values = {"total": total}
    for name, term in terms.items():
        values[name] = term.loss.detach()
        values |= {f"{name}/{metric}": value for metric, value in term.metrics.items()}
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value.clone()

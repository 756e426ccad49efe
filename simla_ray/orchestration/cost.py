"""What a run's training costs in floating-point operations, so that methods can be compared at equal compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from simla_ray.config.enums import CodesKind, ScheduleKind
from simla_ray.config.schema import Run
from simla_ray.data.sample import code_image_px
from simla_ray.models.dvae import DalleEncoder
from simla_ray.models.model import Model
from simla_ray.models.vision import VisionTower
from simla_ray.models.visual_codes import PatchCodes
from simla_ray.objectives.terms import itm_eps_at
from simla_ray.orchestration.preflight.footprint import untrained
from simla_ray.training.measure import CLS_ID, flops, synthetic_batch
from simla_ray.training.step import RIDES, Losses, active_at, alphas_at
from simla_ray.types import Batch


def step_flops(run: Run, vocab_size: int, steps: int | None = None) -> float:
    """FLOPs of a training step per pair, the mean over a run of ``steps`` steps; two for a multiplication with its
    addition, see ``training.measure``.

    Forward and backward of every objective in the steps in which it is on, the teacher's passes and the visual
    tokenizer's. Captions have all ``text.max_tokens``. Left out are the optimiser, the teacher's update, and what is
    computed twice to save memory (``activation_checkpointing``, contrast over several micro-batches); ITC over a step
    counts as that over a micro-batch, which is less by a thousandth at most.

    Args:
        vocab_size: word pieces of the run's vocabulary.
        steps: None for ``optim.max_steps``. Only ``objectives.psl.start_step`` depends on it.

    Raises:
        ValueError: neither is given.
    """
    steps = steps if steps is not None else run.optim.max_steps
    if steps is None:
        raise ValueError("steps: missing, and optim.max_steps is null")
    run = untrained(run).model_copy(update={"activation_checkpointing": False})
    with torch.device("meta"):
        model, tokenizer = Model(run, vocab_size), _tokenizer(run)
    losses = Losses(run, model, tokenizer, CLS_ID, None).train()
    batch = _batch(run, vocab_size)
    alphas, eps = alphas_at(run, 1.0), itm_eps_at(run.objectives.itm, 1.0)

    def loss(active: frozenset[str]) -> Tensor:
        return losses(batch, set(active), alphas, eps)[0]

    total = 0.0
    for active, share in shares_of_steps(run, steps).items():
        sampled = run.schedule.kind is ScheduleKind.sampled
        model.trainable_in(set(run.objectives.active()) if sampled else set(active))
        total += share * flops(partial(loss, active))
        model.zero_grad(set_to_none=True)
    return total / len(batch)


def shares_of_steps(run: Run, steps: int) -> dict[frozenset[str], float]:
    """Every set of objectives that trains together, and the share of the steps in which it does: of a sampled
    schedule what is expected, whatever the seed."""
    on = run.objectives.active()
    if run.schedule.kind is not ScheduleKind.sampled:
        found = Counter(frozenset(active_at(run, step, steps)) for step in range(steps))
        return {active: n / steps for active, n in found.items()}
    psl = run.objectives.psl
    late = psl is not None and "psl" in on and len(on) > 1
    without_psl = min(1.0, psl.start_step / steps) if late and psl is not None else 0.0
    shares = dict.fromkeys(on, 0.0)
    drawn = [name for name in on if RIDES.get(name) not in on]
    for part, names in ((without_psl, [name for name in drawn if name != "psl"]), (1 - without_psl, drawn)):
        mix = {name: run.schedule.mix.get(name, 1.0) for name in names}  # type: ignore[call-overload]
        for name, weight in mix.items() if part else ():
            shares[name] += part * weight / sum(mix.values())
    riders = {name: [rider for rider in on if RIDES.get(rider) == name] for name in drawn}
    return {frozenset({name, *riders[name]}): shares[name] for name in drawn if shares[name]}


def _batch(run: Run, vocab_size: int) -> Batch:
    """A micro-batch on the meta device, whose codes the tokenizer has to make."""
    batch = replace(synthetic_batch(run, vocab_size).to(torch.device("meta")), codes=None)
    if run.codes.kind is CodesKind.dvae:
        side = code_image_px(run)
        batch.code_image = torch.empty((len(batch.patch_mask), 3, side, side), dtype=torch.uint8, device="meta")
    return batch


def _tokenizer(run: Run) -> nn.Module | None:
    """The visual tokenizer, without its weights; with ``codes.kind=features`` the tower that it stands on is taken to
    be one as the run's own.
    """
    if "mim" not in run.objectives.active():
        return None
    if run.codes.kind is CodesKind.dvae:
        return DalleEncoder()
    tower = VisionTower(run.vision, maskable=False) if run.codes.kind is CodesKind.features else None
    width = 3 * run.vision.patch_px**2 if tower is None else tower.width
    return PatchCodes(torch.empty(run.codes.n, width), run.vision.patch_px, tower)

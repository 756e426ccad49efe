"""What a run takes, from its config alone: bytes of a worker's tensors, of a batch, of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast_dtype
from simla_ray.objectives.terms import itm_eps_at
from simla_ray.training.checkpoint import model_tensors
from simla_ray.training.measure import CLS_ID, autocast_on_meta, synthetic_batch
from simla_ray.training.optim import named_parameters
from simla_ray.training.step import Losses, active_at, alphas_at

#: Steps of an imagined run, enough for every phase and every draw of a sampled schedule to come up.
STEPS = 1000
MOMENTS = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes. Those of a worker are of tensors only, without the interpreter, torch and the allocator's waste.

    Args:
        weights: student, heads, teacher and queue of a worker.
        gradients: of everything that is trained; with several workers DistributedDataParallel has a copy of them.
        moments: AdamW's.
        batch: what the largest micro-batch's forward keeps for its backward, in float32.
        checkpoint: one on disk.
        made, encoded: samples of a worker's stream in the object store, and rows they come from; together ``stream``.
    """

    weights: int
    gradients: int
    moments: int
    batch: int
    checkpoint: int
    made: int
    encoded: int

    @property
    def stream(self) -> int:
        return self.made + self.encoded


def footprint(run: Run, *, gpu: bool) -> Footprint:
    """Take a run's measure on the meta device; nothing is allocated or read.

    Args:
        gpu: whether workers get a GPU, which decides the precision of the teacher's copy.
    """
    low = autocast_dtype(run, torch.device("cuda" if gpu else "cpu")) or torch.float32
    with torch.device("meta"):
        model = Model(untrained(run), run.text.vocab_size, low)
    trained = _bytes(parameter for _, parameter in named_parameters(model))
    return Footprint(
        weights=_bytes([*model.parameters(), *model.buffers()]),
        gradients=trained,
        moments=MOMENTS * trained,
        batch=_batch_bytes(run, model),
        checkpoint=_bytes(model_tensors(model).values()) + MOMENTS * trained,
        made=pipeline.made_bytes(run, max(1, run.data.decode_cpus // run.ray.workers)),
        encoded=pipeline.encoded_bytes(run),
    )


def untrained(run: Run) -> Run:
    """The run with random weights in place of downloaded ones."""
    return run.model_copy(update={"vision": run.vision.model_copy(update={"pretrained": False})})


def kinds_of_step(run: Run) -> dict[int, set[str]]:
    """A step of every set of objectives that ever train together, of ``STEPS`` steps: step -> objectives."""
    found = {frozenset(active_at(run, step, STEPS)): step for step in range(STEPS)}
    return {step: set(active) for active, step in found.items()}


def _batch_bytes(run: Run, model: Model) -> int:
    """Distinct storages that autograd keeps between forward and backward, beside weights and the batch itself."""
    losses = Losses(run, model, None, CLS_ID, None).train()
    batch = synthetic_batch(run, run.text.vocab_size).to(torch.device("meta"))
    known = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    known |= {_storage(t) for t in vars(batch).values() if isinstance(t, Tensor)}
    most = 0
    for step, active in kinds_of_step(run).items():
        model.trainable_in(active)
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            if _storage(tensor) not in known:
                kept[_storage(tensor)] = tensor
            return tensor

        alphas, eps = alphas_at(run, step / STEPS), itm_eps_at(run.objectives.itm, step / STEPS)
        with autocast_on_meta(), saved_tensors_hooks(keep, lambda tensor: tensor):
            losses(batch, active, alphas, eps)
        most = max(most, sum(t.untyped_storage().nbytes() for t in kept.values()))
    return most


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Storage that several tensors share counts once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())

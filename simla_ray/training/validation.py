"""Losses against the true targets on fixed validation micro-batches."""

from __future__ import annotations

import torch

from simla_ray.config.schema import Run
from simla_ray.models.precision import autocast
from simla_ray.objectives.terms import itm_eps_at
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, step_seed
from simla_ray.types import Batch

#: Objective -> metrics reported of it.
REPORTED = ("hard", "accuracy")
#: Objectives that predict nothing that could be right or wrong.
WITHOUT_ACCURACY = ("psl", "wpa", "mrfr")


@torch.no_grad()
def fixed_losses(
    run: Run, losses: Losses, batches: list[tuple[int, Batch]], n_batches: int, comm: Comm, device: torch.device
) -> dict[str, float]:
    """Mean over ``n_batches`` micro-batches, of which this worker holds ``batches`` (number, batch).

    The same pictures, words, masks and draws every time, soft targets left out, so that a curve
    over steps shows the model alone. Returns ``{"itc_hard": ..., "itc_accuracy": ..., ...}``, the same on every rank.
    """
    active = set(run.objectives.active())
    alphas = dict.fromkeys(active, 0.0)
    losses.eval()
    sums: dict[str, torch.Tensor] = {}
    for number, batch in batches:
        torch.manual_seed(step_seed(run.seed, -1 % 2**31, number))
        with autocast(run, device):
            _, terms, _, _ = losses(batch.to(device), active, alphas, itm_eps_at(run.objectives.itm, 1.0))
        for name, term in terms.items():
            for metric in REPORTED:
                if metric in term.metrics:
                    key = f"{name}_{metric}"
                    sums[key] = sums.get(key, torch.zeros((), device=device)) + term.metrics[metric]
    losses.train()
    # Every rank must bring the same names, also one that holds no batch.
    on = run.objectives.active()
    names = [f"{n}_{m}" for n in on for m in REPORTED if m != "accuracy" or n not in WITHOUT_ACCURACY]
    stacked = torch.stack([sums.get(n, torch.zeros((), device=device)).double() for n in names])
    return dict(zip(names, (comm.sum(stacked) / n_batches).tolist(), strict=True))

"""AdamW with its parameter groups, and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import nn

from simla_ray.config.schema import NoDecay, Optim
from simla_ray.models.model import Model


def build_optimizer(model: Model, optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW. Each group's ``factor`` multiplies the learning rate.

    Weight decay spares 1-D tensors and biases. The official code also decays embeddings, positions, class and mask
    tokens and the temperature (``no_decay: official``); we do not by default.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters(model):
        decay = optim.weight_decay if _decays(name, parameter, optim.no_decay) else 0.0
        factor = 1.0
        if name.startswith("scale."):
            factor = optim.temperature_lr_factor
        elif ".concept_head." in name:
            factor = optim.concept_lr_factor
        groups.setdefault((decay, factor), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "factor": factor} for (decay, factor), p in groups.items()],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def named_parameters(model: Model) -> list[tuple[str, nn.Parameter]]:
    """Everything that is trained: all parameters but the teacher's, and those that features of regions come from."""
    return [(n, p) for n, p in model.named_parameters() if not n.startswith(("teacher.", "student.vision.features."))]


def _decays(name: str, parameter: nn.Parameter, how: NoDecay) -> bool:
    if how is NoDecay.official:
        # "1-D or named .bias": the temperature has no dimension and is decayed.
        return parameter.ndim != 1 and not name.endswith(".bias")
    exempt = ("pos_embed", "cls_token", "mask_token", "embeddings.weight")
    return parameter.ndim > 1 and not name.endswith(exempt)


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """Linear warm-up from min_lr to lr, then a cosine back to min_lr at the last step."""
    warmup = min(optim.warmup_steps, total)
    if step < warmup:
        return optim.min_lr + (optim.lr - optim.min_lr) * (step + 1) / warmup
    done = (step - warmup) / max(1, total - 1 - warmup)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done))

"""Word-patch alignment, WPA: what it costs to carry a text's words onto a picture's patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ray.types import LossTerm


def wpa_loss(
    words: Tensor,
    mask: Tensor,
    patches: Tensor,
    label: Tensor,
    beta: float,
    iterations: int,
    patch_mask: Tensor | None = None,
) -> LossTerm:
    """Cheap transport for matched pairs, dear for swapped ones:

        loss = (sum over matched b of d_b - sum over swapped b of d_b) / B      d_b = sum_ij C_ij T_ij
        C_ij = 1 - cosine(word i, patch j)      T = ``transport_plan(C)``, without a gradient

    Source: UNITER, arXiv 1909.11740, ``optimal_transport_dist``, over regions; ViLT, ``compute_itm_wpa``, which leaves
    [CLS], [SEP] and the image's class token out; so must the caller.

    Args:
        words: (B, S, D); mask: (B, S) bool, its words. patches: (B, P, D), all of them there, or regions.
        label: (B,) int64, 1 for matched pairs.
        patch_mask: (B, P) bool, regions that are there; None: all.

    ``metrics["gap"]``: mean cost of swapped pairs less that of matched ones.
    """
    with torch.autocast(words.device.type, enabled=False):
        cost = 1 - _unit(words) @ _unit(patches).transpose(1, 2)
        cost = cost.masked_fill(~mask[:, :, None], 0)
        if patch_mask is not None:
            cost = cost.masked_fill(~patch_mask[:, None, :], 0)
        plan = transport_plan(cost.detach(), mask, beta, iterations, patch_mask)
        distance = (cost * plan).sum((1, 2))
    matched = label == 1
    loss = torch.where(matched, distance, -distance).mean()
    means = [(distance * some).sum() / some.sum().clamp(min=1) for some in (matched, ~matched)]
    return LossTerm(loss, {"hard": loss.detach(), "gap": (means[1] - means[0]).detach()})


@torch.no_grad()
def transport_plan(cost: Tensor, mask: Tensor, beta: float, iterations: int, columns: Tensor | None = None) -> Tensor:
    """IPOT (arXiv 1802.04307, algorithm 1, one inner step): an approximate optimal plan between uniform marginals.

        A = exp(-C / beta), T = 1, sigma = 1/m;   repeat:  Q = A * T
        delta_j = 1 / (n sum_i Q_ij sigma_i)    sigma_i = 1 / (m sum_j Q_ij delta_j)    T_ij = sigma_i Q_ij delta_j

    Rows sum to 1/m exactly; columns to 1/n the better the more ``iterations``.

    Args:
        cost: (B, m, n); mask: (B, m) bool, rows that are there. Every row of the batch has one, or its plan is zero.
        columns: (B, n) bool, columns that are there; None: all.

    Returns:
        (B, m, n), zero in rows and columns that are not there.
    """
    there = mask[:, :, None].to(cost.dtype)  # (B, m, 1)
    m = there.sum(1, keepdim=True).clamp(min=1)
    n: int | Tensor = cost.shape[2]
    kernel = (-cost / beta).exp() * there
    if columns is not None:  # a column without a kernel gets nothing, however large its delta
        kernel = kernel * columns[:, None, :]
        n = columns.sum(1)[:, None, None].clamp(min=1)
    plan, sigma = torch.ones_like(cost), there / m
    for _ in range(iterations):
        scaled = kernel * plan
        delta = 1 / (n * (scaled.transpose(1, 2) @ sigma).clamp(min=torch.finfo(cost.dtype).tiny))  # (B, n, 1)
        sigma = there / (m * (scaled @ delta) + (1 - there))
        plan = sigma * scaled * delta.transpose(1, 2)
    return plan


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

"""Relevance of an image's patches for a text: Grad-CAM over the attention of words to patches.

The official code (``Grounding.py``) reads one layer of twelve; the best single layer changes from run to run and with
few layers the last one is empty, so we sum over all, or over any set of them. Layers are numbered from 0 as in the
official code and in the weights' names; only those that read the image count.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simla_ray.errors import UserError
from simla_ray.evaluation.scorer import Scorer
from simla_ray.models.precision import autocast
from simla_ray.models.stack import Attentions

#: Numbers of layers.
Layers = tuple[int, ...]


def cross_layers(scorer: Scorer) -> Layers:
    """The layers in which words read patches: by cross-attention, or merged, by self-attention."""
    return tuple(scorer.model.student.fusion_layers)


def checked_layers(scorer: Scorer, layers: Sequence[int] | None) -> Layers:
    """The layers, in order; all for None.

    Raises:
        UserError: one of them is not there, or there is none.
    """
    known = cross_layers(scorer)
    if not known:
        raise UserError(f"{scorer.run.label} has images made of regions; a map needs patches")
    if layers is None:
        return known
    for layer in layers:
        if layer not in known:
            raise UserError(f"layers: {layer} does not read the image; those that do: {', '.join(map(str, known))}")
    if not layers:
        raise UserError(f"layers: none given; there are {', '.join(map(str, known))}")
    return tuple(sorted(set(layers)))


def grad_cam(
    scorer: Scorer,
    image_tokens: Tensor,
    image_index: Tensor,
    ids: Tensor,
    mask: Tensor,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Relevance of each patch for a match, (n, P) float32, at least 0: the sum of ``layer_cams`` over the layers.

    Args:
        layers: None for all.
    """
    return over_layers(layer_cams(scorer, image_tokens, image_index, ids, mask, checked_layers(scorer, layers)))


def layer_cams(
    scorer: Scorer, image_tokens: Tensor, image_index: Tensor, ids: Tensor, mask: Tensor, layers: Layers
) -> Tensor:
    """Relevance of each patch by each of the layers, (layers, n, P) float32, at least 0.

    Attention probabilities x relu(their gradient of the ITM logit of a match), without the image's [CLS], mean over
    heads, sum over the text's real tokens. (The official code takes the mean over all, padding too: another scale.)

    Args:
        image_tokens: (m, N, D); image_index: (n,) row of it that each text reads; ids, mask: (n, L).
    """
    assert scorer.model.itm_head is not None
    keep = Attentions(want_cross=True)
    with torch.enable_grad():
        # The tokens ask for a gradient so that there is a graph even where no parameter does.
        hidden = scorer.fuse(image_tokens.detach().requires_grad_(), image_index, ids, mask, keep)
        with autocast(scorer.run, scorer.device):
            logit = scorer.model.match(hidden[:, 0])[:, 1]
        first = cross_layers(scorer)[0]
        probabilities = [keep.cross[layer - first] for layer in layers]
        gradients = torch.autograd.grad(logit.float().sum(), probabilities)
    return torch.stack([cam_of(*pair, mask) for pair in zip(probabilities, gradients, strict=True)])


def cam_of(probability: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """A layer's (n, H, L, N) probabilities and gradients, mask (n, L) -> (n, P) float32."""
    cam = probability.detach().float() * gradient.float().relu() * mask[:, None, :, None]
    return cam[..., 1:].sum(2).mean(1)


def over_layers(cams: Any) -> Any:
    """(layers, n, P), a tensor or an array -> (n, P), added layer by layer: rounding is the same on every device."""
    return functools.reduce(operator.add, cams)

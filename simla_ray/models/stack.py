"""The one transformer stack: text, text queries over the image, image queries over the text.

Post-norm BERT layers, [self-attention -> optional cross-attention -> FFN] (official ``models/med.py``, ``BertLayer``);
leaving out the memory gives the language encoder, giving it the multimodal one, with the same weights. Parameter names
follow Hugging Face's BERT, so that its weights load unmapped; cross-attention is called ``crossattention`` as in its
decoder layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-12


@dataclass
class Memory:
    """What cross-attention reads: ``states`` (R, S, D), ``mask`` (R, S) bool or None.

    ``index`` (B,) names the row each query row reads, so that keys and values of an image that several query rows share
    are projected once.
    """

    states: Tensor
    mask: Tensor | None = None
    index: Tensor | None = None


@dataclass
class Attentions:
    """Attention probabilities kept on request: ``cls`` (B, H, L), the last layer's self-attention row of [CLS],
    detached; ``cross``, one (B, H, L, S) per layer, with gradient."""

    want_cls: bool = False
    want_cross: bool = False
    cls: Tensor | None = None
    cross: list[Tensor] = field(default_factory=list)


class Stack(nn.Module):
    """``depth`` layers; forward keeps the shape (B, L, D)."""

    def __init__(self, depth: int, width: int, heads: int, ffn: int, dropout: float, memory_width: int | None):
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, heads, ffn, dropout, memory_width) for _ in range(depth))

    def forward(
        self, hidden: Tensor, mask: Tensor | None, memory: Memory | None = None, keep: Attentions | None = None
    ) -> Tensor:
        """hidden (B, L, D), mask (B, L) bool or None; ``keep`` is filled with the attentions it asks for."""
        last = len(self.layer) - 1
        for i, layer in enumerate(self.layer):
            if keep is not None and keep.want_cls and i == last:
                keep.cls = layer.attention.cls_probabilities(hidden, mask)
            hidden = layer(hidden, mask, memory, keep)
        return hidden


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float, memory_width: int | None):
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        if memory_width is not None:
            self.crossattention = Attention(width, memory_width, heads, dropout)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, ffn)})
        self.output = Residual(ffn, width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Memory | None, keep: Attentions | None) -> Tensor:
        x = self.attention(x, Memory(x, mask))
        if memory is not None:
            x = self.crossattention(x, memory, keep if keep is not None and keep.want_cross else None)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Residual(nn.Module):
    """dense -> dropout -> + input -> LayerNorm"""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    def __init__(self, width: int, memory_width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(memory_width, width),
                "value": nn.Linear(memory_width, width),
            }
        )
        self.output = Residual(width, width, dropout)

    def forward(self, x: Tensor, memory: Memory, keep: Attentions | None = None) -> Tensor:
        query = self._split(self.self["query"](x))
        key, value = self._split(self.self["key"](memory.states)), self._split(self.self["value"](memory.states))
        mask = memory.mask
        if memory.index is not None:
            key, value = key[memory.index], value[memory.index]
            mask = mask[memory.index] if mask is not None else None
        allowed = mask[:, None, None, :] if mask is not None else None
        if keep is None:
            context = F.scaled_dot_product_attention(
                query, key, value, allowed, dropout_p=self.dropout if self.training else 0.0
            )
        else:
            probabilities = _probabilities(query, key, allowed)
            keep.cross.append(probabilities)
            context = probabilities @ value
        return self.output(context.transpose(1, 2).flatten(2), x)

    @torch.no_grad()
    def cls_probabilities(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, H, L): the self-attention probabilities of query 0, before dropout."""
        query, key = self._split(self.self["query"](x[:, :1])), self._split(self.self["key"](x))
        return _probabilities(query, key, mask[:, None, None, :] if mask is not None else None)[:, :, 0]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _probabilities(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1)

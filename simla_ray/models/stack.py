"""The one transformer stack: text, text queries over the image, image queries over the text.

Post-norm BERT layers, [self-attention -> optional cross-attention -> FFN] (official ``models/med.py``, ``BertLayer``);
leaving out the memory gives the language encoder, giving it the multimodal one, with the same weights. Parameter names
follow Hugging Face's BERT, so that its weights load unmapped; cross-attention is called ``crossattention`` as in its
decoder layers.

Nobody reads every position of a last layer: ITM wants [CLS], MLM the masked words, MIM the masked patches. ``Read``
says which, and the last layer computes no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simla_ray.models.dropout import Dropout, attend_with_dropout, attention_probabilities, cheap_on

LAYER_NORM_EPS = 1e-12


@dataclass
class Memory:
    """What cross-attention reads: ``states`` (R, S, D), ``mask`` (R, S) bool or None.

    Keys and values of a row are projected once, whoever reads it. The first queries come in whole groups of R that read
    rows 0..R-1; their keys and values are not even copied. The last ones read the rows that ``index`` (I,) names.
    """

    states: Tensor
    mask: Tensor | None = None
    index: Tensor | None = None


@dataclass
class Attentions:
    """Attention probabilities kept on request: ``cls`` (n, H, L), the last layer's self-attention row of [CLS] of the
    query rows ``cls_rows``, detached; ``cross``, one (B, H, L, S) per layer, with gradient."""

    cls_rows: slice | None = None
    want_cross: bool = False
    cls: Tensor | None = None
    cross: list[Tensor] = field(default_factory=list)


@dataclass
class Read:
    """What is wanted of the last layer: positions ``at`` (n, M) of the query rows ``rows``.

    They read the rows ``memory`` of the memory, by the part ``index`` of its index.
    """

    rows: slice
    at: Tensor
    memory: slice = field(default_factory=lambda: slice(None))
    index: Tensor | None = None


class Stack(nn.Module):
    """``depth`` layers; those from ``cross_from`` on have a cross-attention."""

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        ffn: int,
        dropout: float,
        memory_width: int | None,
        cross_from: int = 0,
    ):
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(width, heads, ffn, dropout, memory_width if i >= cross_from else None) for i in range(depth)
        )
        self.saves_memory = False  # recompute a layer's inside in the backward pass

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Memory | None = None,
        keep: Attentions | None = None,
        reads: list[Read] | None = None,
        layers: slice = slice(None),
    ) -> Any:
        """hidden (B, L, D), mask (B, L), (1, L, L) bool or None -> (B, L, D), or with ``reads`` one (n, M, D) for each.

        ``keep`` is filled with what it asks for; ``layers``: the part of the stack that runs.
        """
        *below, last = self.layer[layers]
        for layer in below:
            hidden = self._run(layer, hidden, hidden, mask, memory, keep)
        if keep is not None and keep.cls_rows is not None:
            rows = keep.cls_rows
            keep.cls = last.attention.cls_probabilities(hidden[rows], mask[rows] if mask is not None else None)
        if reads is None:
            return self._run(last, hidden, hidden, mask, memory, keep)
        found = []
        projected: dict[str, tuple[Tensor, Tensor]] = {}  # reads of the same memory rows share keys and values
        for r in reads:
            states, part, key_value = hidden[r.rows], None, None
            if memory is not None:
                part_mask = memory.mask[r.memory] if memory.mask is not None else None
                part, name = Memory(memory.states[r.memory], part_mask, r.index), str(r.memory)
                if name not in projected:
                    projected[name] = last.crossattention.project(part.states)
                key_value = projected[name]
            queries = states.gather(1, r.at[:, :, None].expand(-1, -1, states.shape[-1]))
            found.append(last(queries, states, mask[r.rows] if mask is not None else None, part, None, key_value))
        return found

    def _run(self, layer: nn.Module, *inputs: Tensor | Memory | Attentions | None) -> Tensor:
        if self.saves_memory and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float, memory_width: int | None):
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        if memory_width is not None:
            self.crossattention = Attention(width, memory_width, heads, dropout)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, ffn)})
        self.output = Residual(ffn, width, dropout)

    def forward(
        self,
        x: Tensor,
        states: Tensor,
        mask: Tensor | None,
        memory: Memory | None,
        keep: Attentions | None = None,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Positions x (B, M, D) of the sequences states (B, L, D), mask (B, L) -> (B, M, D).

        ``projected``: the memory's keys and values, where they are at hand.
        """
        x = self.attention(x, *self.attention.project(states), mask)
        if memory is not None:
            key, value = projected if projected is not None else self.crossattention.project(memory.states)
            keep = keep if keep is not None and keep.want_cross else None
            x = self.crossattention(x, key, value, memory.mask, memory.index, keep)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Residual(nn.Module):
    """dense -> dropout -> + input -> LayerNorm"""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout.add(self.dense(x), residual))


class Attention(nn.Module):
    """Multi-head attention with its output projection, residual and LayerNorm."""

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

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(R, S, D) -> keys and values, (R, H, S, D/H) each."""
        return self._split(self.self["key"](states)), self._split(self.self["value"](states))

    def forward(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        index: Tensor | None = None,
        keep: Attentions | None = None,
    ) -> Tensor:
        """x (B, M, D) over keys and values of R rows; who reads which row: see ``Memory``."""
        query, rows = self._split(self.self["query"](x)), len(key)
        own = len(x) - (len(index) if index is not None else 0)
        parts = []
        if own:
            # Queries do not see each other: groups that read the same rows are one longer sequence of queries.
            groups = query[:own].unflatten(0, (own // rows, rows))  # (G, R, H, M, d)
            joined = groups.permute(1, 2, 0, 3, 4).flatten(2, 3) if own > rows else query[:own]
            context = self._attend(joined, key, value, mask, keep)
            if own > rows:
                context = context.unflatten(2, (own // rows, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)
            parts.append(context)
        if index is not None:
            chosen = mask.index_select(0, index) if mask is not None else None
            parts.append(
                self._attend(query[own:], key.index_select(0, index), value.index_select(0, index), chosen, keep)
            )
        joined = [part.transpose(1, 2) for part in parts]
        return self.output((torch.cat(joined) if len(joined) > 1 else joined[0]).flatten(2), x)

    def in_turn(self, x: Tensor, key: Tensor, value: Tensor, counts: Sequence[int]) -> Tensor:
        """x (B, M, D) over keys and values of R rows, without copies of them: the first ``counts[0]`` read row 0, the
        next ``counts[1]`` row 1, and so on."""
        query, parts, row, first = self.self["query"](x), [], 0, 0
        for count, same in groupby(counts):
            rows = len(list(same))
            if count:  # queries do not see each other: those of a row are one longer sequence
                own = self._split(query[first : first + rows * count].unflatten(0, (rows, count)).flatten(1, 2))
                context = self._attend(own, key[row : row + rows], value[row : row + rows], None, None)
                parts.append(context.transpose(1, 2).reshape(rows * count, *x.shape[1:]))
            row, first = row + rows, first + rows * count
        return self.output(torch.cat(parts) if len(parts) > 1 else parts[0], x)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Attentions | None
    ) -> Tensor:
        allowed = _per_query(mask)
        dropout = self.dropout if self.training else 0.0
        if keep is not None:
            probabilities = attention_probabilities(query, key, allowed)
            keep.cross.append(probabilities)
            return F.dropout(probabilities, dropout) @ value
        if dropout > 0 and cheap_on(query):
            return attend_with_dropout(query, key, value, allowed, dropout)
        return F.scaled_dot_product_attention(query, key, value, allowed, dropout_p=dropout)

    @torch.no_grad()
    def cls_probabilities(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, H, L): the self-attention probabilities of query 0, before dropout."""
        query, key = self._split(self.self["query"](x[:, :1])), self._split(self.self["key"](x))
        return attention_probabilities(query, key, mask[:, None, None, :] if mask is not None else None)[:, :, 0]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _per_query(mask: Tensor | None) -> Tensor | None:
    """(B, S) or (1, L, S) -> for all heads, (B, 1, 1, S) or (1, 1, L, S)."""
    if mask is None:
        return None
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]

"""Text embeddings, the stack and the MLM head, named as Hugging Face's ``BertForMaskedLM`` names them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ray.config.enums import Fusion
from simla_ray.config.schema import Text
from simla_ray.models.dropout import Dropout
from simla_ray.models.stack import LAYER_NORM_EPS, Attentions, Memory, Read, Stack


class TextModel(nn.Module):
    """BERT whose layers double as fusion layers. No token types, as in SIMLA (official ``models/med.py``).

    With fusion in every layer (SIMLA) the language encoder is all layers with cross-attention left out, and the
    multimodal one starts from the embeddings again. With fusion in the upper half (ALBEF) the lower half is the
    language encoder, and the upper half starts from its states. Without any fusion, only the language encoder's layers
    exist; merged, the layers take words and image tokens side by side, and where they are the Vision Transformer's none
    exists, and what is left are embeddings and the MLM head. In two stages only the lower half is here.
    """

    def __init__(self, config: Text, vocab_size: int, *, memory_width: int | None, mlm_head: bool, concepts: int = 0):
        super().__init__()
        self.split = config.fusion in (Fusion.upper_half, Fusion.two_stage)
        self.merged = config.fusion is Fusion.merged
        half = config.depth // 2
        depth = half if self.split and memory_width is None else config.depth
        self.language_layers = slice(0, half if self.split else depth)
        self.fusion_layers = slice(half if self.split else 0, depth)
        self.embeddings = Embeddings(config, vocab_size, concepts)
        self.encoder = Stack(
            depth, config.width, config.heads, config.ffn, config.dropout, memory_width, self.fusion_layers.start
        )
        self.cls = nn.ModuleDict({"predictions": MlmHead(config.width, vocab_size)}) if mlm_head else None
        self.apply(bert_init)

    def encode(self, ids: Tensor, mask: Tensor, memory: Memory | None = None, keep: Attentions | None = None) -> Tensor:
        """ids (B, L), mask (B, L) -> (B, L, D): the language encoder, or with a memory the multimodal one."""
        states = self.embeddings(ids)
        if memory is None or self.split:
            states = self.encoder(states, mask, layers=self.language_layers)
        return states if memory is None else self.encoder(states, mask, memory, keep, layers=self.fusion_layers)

    def fuse(
        self, states: Tensor, mask: Tensor, memory: Memory, reads: list[Read], keep: Attentions | None = None
    ) -> list[Tensor]:
        """The multimodal encoder over states (B, L, D): embedded text, or with fusion in the upper half what the
        language encoder gave. Of its last layer only what is read."""
        return self.encoder(states, mask, memory, keep, reads, self.fusion_layers)

    def query_with_image(self, image_tokens: Tensor, memory: Memory, at: Tensor) -> Tensor:
        """image_tokens (B, N, D) as queries over a text memory; at (B, M) -> (B, M, D).

        They get the text's positions, LayerNorm and dropout, no modality embedding (official ``SIMLA.forward``, MIM).
        """
        states = self.embeddings.finish(image_tokens)
        return self.encoder(states, None, memory, reads=[Read(slice(None), at)])[0]

    def word_logits(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., V); the decoder is tied to the word embeddings.

        ``table``: those that ``Embeddings.look_up`` handed out in the same pass.
        """
        assert self.cls is not None
        return self.cls["predictions"](hidden, self.embeddings.word_embeddings.weight if table is None else table)


def read_cls(mask: Tensor, rows: slice = slice(None), index: Tensor | None = None) -> Read:
    """Read [CLS] of these rows of mask (B, L)."""
    n = len(range(len(mask))[rows])
    return Read(rows, torch.zeros(n, 1, dtype=torch.int64, device=mask.device), index=index)


class Embeddings(nn.Module):
    """Vectors of words, and of ``concepts`` phrase concepts, whose ids follow those of words; nobody predicts them."""

    def __init__(self, config: Text, vocab_size: int, concepts: int = 0):
        super().__init__()
        # As in Hugging Face's BERT, [PAD] (id 0 in every vocabulary we accept) gets no gradient as an input.
        self.word_embeddings = nn.Embedding(vocab_size, config.width, padding_idx=0)
        self.concept_embeddings = nn.Embedding(concepts, config.width) if concepts else None
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self._with_concepts(ids, self.word_embeddings(self._pieces(ids))))

    def look_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> the words' vectors (B, L, D), and the table (V, D) for whoever else reads it.

        Read through this table, the gradients of both uses are one tensor of the vocabulary's size instead of two.
        """
        words, table = _LookUp.apply(self.word_embeddings.weight, self._pieces(ids), self.word_embeddings.padding_idx)
        return self._with_concepts(ids, words), table

    def _pieces(self, ids: Tensor) -> Tensor:
        """ids with [PAD], which gets no gradient, in place of concepts'."""
        if self.concept_embeddings is None:
            return ids
        return ids.masked_fill(ids >= self.word_embeddings.num_embeddings, 0)

    def _with_concepts(self, ids: Tensor, words: Tensor) -> Tensor:
        """The vectors of words, (..., D), with those of concepts where ids (...) are theirs."""
        if self.concept_embeddings is None:
            return words
        number = ids - self.word_embeddings.num_embeddings
        return torch.where((number >= 0)[..., None], self.concept_embeddings(number.clamp(min=0)), words)

    def finish(self, x: Tensor) -> Tensor:
        """Add positions 0.., normalise, drop out: (B, S, D) -> (B, S, D)."""
        return self.dropout(self.LayerNorm(x + self.position_embeddings.weight[: x.shape[1]]))


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = table.shape, padding
        return F.embedding(ids, table), table

    @staticmethod
    def backward(ctx: Any, d_words: Tensor | None, d_table: Tensor | None) -> tuple[Tensor | None, None, None]:
        if d_words is None:
            return d_table, None, None
        (ids,) = ctx.saved_tensors
        if d_table is None:
            d_table = d_words.new_zeros(ctx.shape)
        # In place: what the head's product gave belongs to nobody else.
        rows = torch.where((ids == ctx.padding)[..., None], 0, d_words).flatten(0, -2)
        return d_table.index_add_(0, ids.flatten(), rows.to(d_table.dtype)), None, None


class MlmHead(nn.Module):
    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=LAYER_NORM_EPS)}
        )

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        hidden = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))
        return F.linear(hidden, word_embeddings, self.bias)


def bert_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

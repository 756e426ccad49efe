"""Text embeddings, the stack and the MLM head, named as Hugging Face's ``BertForMaskedLM`` names them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ray.config.schema import Text
from simla_ray.models.stack import LAYER_NORM_EPS, Attentions, Memory, Stack


class TextModel(nn.Module):
    """BERT with optional cross-attention in every layer. No token types, as in SIMLA (official ``models/med.py``)."""

    def __init__(self, config: Text, vocab_size: int, *, memory_width: int | None, mlm_head: bool):
        super().__init__()
        self.embeddings = Embeddings(config, vocab_size)
        self.encoder = Stack(config.depth, config.width, config.heads, config.ffn, config.dropout, memory_width)
        self.cls = nn.ModuleDict({"predictions": MlmHead(config.width, vocab_size)}) if mlm_head else None
        self.apply(_bert_init)

    def encode(self, ids: Tensor, mask: Tensor, memory: Memory | None = None, keep: Attentions | None = None) -> Tensor:
        """ids (B, L), mask (B, L) -> (B, L, D): the language encoder, or with a memory the multimodal one."""
        return self.encoder(self.embeddings(ids), mask, memory, keep)

    def query_with_image(self, image_tokens: Tensor, memory: Memory) -> Tensor:
        """image_tokens (B, N, D) as queries over a text memory -> (B, N, D).

        They get the text's positions, LayerNorm and dropout, no modality embedding (official ``SIMLA.forward``, MIM).
        """
        return self.encoder(self.embeddings.finish(image_tokens), None, memory)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V); the decoder is tied to the word embeddings."""
        assert self.cls is not None
        return self.cls["predictions"](hidden, self.embeddings.word_embeddings.weight)


class Embeddings(nn.Module):
    def __init__(self, config: Text, vocab_size: int):
        super().__init__()
        # As in Hugging Face's BERT, [PAD] (id 0 in every vocabulary we accept) gets no gradient as an input.
        self.word_embeddings = nn.Embedding(vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self.word_embeddings(ids))

    def finish(self, x: Tensor) -> Tensor:
        """Add positions 0.., normalise, drop out: (B, S, D) -> (B, S, D)."""
        return self.dropout(self.LayerNorm(x + self.position_embeddings.weight[: x.shape[1]]))


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


def _bert_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

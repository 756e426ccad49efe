"""Two stages of one BERT (MVPTR, arXiv 2201.12596): a tower over words and phrase concepts, one over tags and regions,
and layers over what both give, side by side.

Source: ``modeling_vlbert.py``, ``BiBertImgModel``. The text tower is ``TextModel``'s lower half; what is here is the
rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simla_ray.config.schema import Run, Text
from simla_ray.models.dropout import Dropout
from simla_ray.models.regions import CELLS, STYLES, box_geometry
from simla_ray.models.stack import Read, Stack
from simla_ray.models.text import MlmHead, TextModel, bert_init

OF_TEXT, OF_TAGS = 0, 1


class TwoStage(nn.Module):
    """Image tower, fused layers, and the vectors that MVPTR adds to BERT's embeddings.

    Args:
        concepts: rows of the concepts' table; their ids follow the ``vocab_size`` word pieces.
        feature_width: numbers of a region's feature, its place not included.
        tag_head: whether tags are predicted (MCR).
    """

    def __init__(self, config: Text, vocab_size: int, concepts: int, feature_width: int, *, tag_head: bool):
        super().__init__()
        width, lower = config.width, config.depth // 2
        self.vocab_size = vocab_size
        self.concepts = nn.Embedding(concepts, width) if concepts else None
        self.types = nn.Embedding(2, width)
        self.regions = nn.Linear(feature_width + STYLES["six"], width)
        self.dropout = Dropout(config.dropout)
        shape = width, config.heads, config.ffn, config.dropout, None
        self.image, self.fused = Stack(lower, *shape), Stack(config.depth - lower, *shape)
        self.tag_head = MlmHead(width, vocab_size) if tag_head else None
        self.apply(bert_init)
        # Not BERT's start: at small widths that would leave ITM a fraction of its gradient (see ``Merging``).
        self.pooler = nn.Linear(width, width)

    def trainable_in(self, objectives: set[str]) -> None:
        """Let exactly those parameters require gradients that these objectives reach."""
        self.fused.requires_grad_(bool(objectives & {"itm", "mlm", "wpg"}))
        self.pooler.requires_grad_("itm" in objectives)
        if self.tag_head is not None:
            self.tag_head.requires_grad_("mcr" in objectives)

    def embed_text(self, text: TextModel, ids: Tensor, words: Tensor) -> Tensor:
        """ids (B, L), some of them concepts', and ``words`` (B, L, D) the vectors that the word table gave for
        ``word_ids`` of them -> (B, L, D).
        """
        if self.concepts is not None:
            new = ids >= self.vocab_size
            words = torch.where(new[:, :, None], self.concepts((ids - self.vocab_size).clamp(min=0)), words)
        return text.embeddings.finish(words + self.types.weight[OF_TEXT])

    def word_ids(self, ids: Tensor) -> Tensor:
        """ids (B, L) with [PAD], which gets no gradient, for concepts that are no word pieces."""
        return ids.masked_fill(ids >= self.vocab_size, 0)

    def text_states(self, text: TextModel, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, L) -> (B, L, D), the text tower's."""
        words = text.embeddings.word_embeddings(self.word_ids(ids))
        return text.encoder(self.embed_text(text, ids, words), mask)

    def embed_image(self, text: TextModel, tags: Tensor, features: Tensor, boxes: Tensor) -> Tensor:
        """tags (B, G, D), vectors of their words; features (B, R, d); boxes (B, R, 4) -> (B, G + R, D)."""
        places = box_geometry(boxes, "six").to(features.dtype)
        regions = self.dropout(self.regions(torch.cat([features, places], -1)))
        return torch.cat([text.embeddings.finish(tags + self.types.weight[OF_TAGS]), regions], 1)

    def image_states(self, text: TextModel, tag_ids: Tensor, features: Tensor, boxes: Tensor, there: Tensor) -> Tensor:
        """tag_ids (B, G), features (B, R, d), boxes (B, R, 4), there (B, R) bool -> (B, 1 + R, D): the image tower's
        [CLS] and regions.
        """
        tags = text.embeddings.word_embeddings(tag_ids)
        states = self.image(self.embed_image(text, tags, features, boxes), torch.cat([tag_ids != 0, there], 1))
        return torch.cat([states[:, :1], states[:, tag_ids.shape[1] :]], 1)

    def cls(self, words: Tensor, mask: Tensor, regions: Tensor, there: Tensor) -> Tensor:
        """States of both towers with their masks -> (B, D), the fused [CLS] alone."""
        first = torch.zeros(len(words), 1, dtype=torch.int64, device=words.device)
        states, masks = torch.cat([words, regions], 1), torch.cat([mask, there], 1)
        (cls,) = self.fused(states, masks, reads=[Read(slice(None), first)])
        return cls[:, 0]

    def pool(self, cls: Tensor) -> Tensor:
        """(n, D) -> (n, D)"""
        return self.pooler(cls).tanh()

    def tag_logits(self, states: Tensor, table: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, V); ``table``: the words' vectors, to which the decoder is tied."""
        assert self.tag_head is not None
        return self.tag_head(states, table)


def two_stage(run: Run, vocab_size: int) -> TwoStage:
    """The stages of a run; regions without a column are their own pixels."""
    assert run.regions is not None
    stages = TwoStage(
        run.text,
        vocab_size,
        run.concepts.most if run.text.concepts else 0,
        run.regions.width or 3 * CELLS**2,
        tag_head="mcr" in run.objectives.active(),
    )
    for stack in (stages.image, stages.fused):
        stack.saves_memory = run.activation_checkpointing
    return stages

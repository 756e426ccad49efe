"""Two stages of BERT layers (MVPTR, arXiv 2201.12596): a tower over words and phrase concepts, one over tags and
regions, and layers over what both give, side by side.

Source: ``modeling_vlbert.py``, ``BiBertImgModel``. The text tower is ``TextModel``'s lower half; here is the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simla_ray.config.schema import Run
from simla_ray.models.dropout import Dropout
from simla_ray.models.region_merging import RegionMerging
from simla_ray.models.regions import STYLES, RegionSide, box_geometry
from simla_ray.models.stack import Attentions, Read, Stack
from simla_ray.models.text import Embeddings, MlmHead, bert_init

STYLE = "six"


class TaggedRegionTower(RegionSide):
    """BERT layers over [CLS], tags, [SEP] and regions. Tags are embedded as words are, with a type of their own;
    regions have neither position nor type, where they lie is part of their features.

    Args:
        tag_head: whether tags are predicted (MCR).
    """

    mask_token = None
    embeddings: Embeddings

    def __init__(self, run: Run, vocab_size: int, *, tag_head: bool):
        super().__init__(run)
        text = run.text
        self.width, self.saves_memory = text.width, False
        # BERT's second token type, less the first one, which is part of the positions.
        self.tag_type = nn.Parameter(torch.empty(text.width).normal_(std=0.02))
        self.regions = nn.Linear(self.feature_width + STYLES[STYLE], text.width)
        self.dropout = Dropout(text.dropout)
        self.encoder = bert_layers(run, text.depth // 2)
        self.tag_head = MlmHead(text.width, vocab_size).apply(bert_init) if tag_head else None
        bert_init(self.regions)

    def embed_with(self, embeddings: Embeddings) -> None:
        """Embed tags as the text tower embeds words.

        No submodule: the parameters are that tower's, and a state has each of them once.
        """
        self.__dict__["embeddings"] = embeddings

    def forward(
        self,
        image: Tensor,
        tag_ids: Tensor,
        regions: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, 1 + R, D): [CLS] and the regions, of which rows of zeros are not there; arguments as ``Batch`` has
        them. Of a picture that comes without boxes the regions are the cells of the grid.
        """
        boxes = self.boxes_of(image, region_boxes)
        if region_mask is None:
            region_mask = torch.ones(boxes.shape[:2], dtype=torch.bool, device=image.device)
        tags = self.embeddings.word_embeddings(tag_ids)
        states = self.states(tags, tag_ids != 0, self.look(image, regions, boxes), boxes, region_mask)
        seen = states[:, tag_ids.shape[1] :] * region_mask[:, :, None]
        return torch.cat([states[:, :1], seen], 1)

    def states(self, tags: Tensor, tag_mask: Tensor, features: Tensor, boxes: Tensor, there: Tensor) -> Tensor:
        """tags (B, G, D), vectors of their words, with their mask (B, G); features (B, R, d), boxes (B, R, 4) and mask
        (B, R) of regions -> (B, G + R, D).
        """
        where = box_geometry(boxes.to(features.dtype), STYLE)
        regions = self.dropout(self.regions(torch.cat([features, where], -1)))
        tags = self.embeddings.finish(tags + self.tag_type)
        return self.encoder(torch.cat([tags, regions], 1), torch.cat([tag_mask, there], 1))

    def tag_logits(self, states: Tensor, table: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, V); ``table``: the words' vectors, to which the decoder is tied."""
        assert self.tag_head is not None
        return self.tag_head(states, table)


class StageMerging(RegionMerging):
    """The layers over states of both towers, and the pooler of the text's [CLS].

    Of an image's tokens the first, its tower's [CLS], stays behind.
    """

    def __init__(self, run: Run, *, pooled: bool):
        super().__init__(run.text.width, pooled=pooled)
        self.encoder = bert_layers(run, run.text.depth - run.text.depth // 2)

    def forward(
        self, stack: Stack, words: Tensor, mask: Tensor, regions: Tensor, keep: Attentions | None = None
    ) -> tuple[Tensor, Tensor]:
        """States of the text tower (n, L, D) with their mask (n, L), tokens (n, 1 + R, D) -> those of both, (n, L, D)
        and (n, R, D).
        """
        return super().forward(stack, words, mask, regions[:, 1:], keep)

    def read(self, stack: Stack, words: Tensor, mask: Tensor, regions: Tensor, reads: Sequence[Read]) -> list[Tensor]:
        """As ``RegionMerging.read``, of tokens (n, 1 + R, D)."""
        return super().read(stack, words, mask, regions[:, 1:], reads)


def bert_layers(run: Run, depth: int) -> Stack:
    """A stack as that of the text, without anything to fuse with."""
    text = run.text
    stack = Stack(depth, text.width, text.heads, text.ffn, text.dropout, None)
    stack.saves_memory = run.activation_checkpointing
    stack.apply(bert_init)
    return stack

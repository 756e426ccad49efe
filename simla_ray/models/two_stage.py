"""Two stages of BERT layers (MVPTR, arXiv 2201.12596): a tower over words and phrase concepts, one over tags and
regions, and layers over what both give, side by side.

Source: ``modeling_vlbert.py``, ``BiBertImgModel``. The text tower is ``TextModel``'s lower half; here is the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simla_ray.config.schema import RegionSource, Run
from simla_ray.errors import UserError
from simla_ray.models.dropout import Dropout
from simla_ray.models.regions import STYLES, RegionFeatures, box_geometry
from simla_ray.models.stack import Read, Stack
from simla_ray.models.text import Embeddings, MlmHead, bert_init

STYLE = "six"


class TaggedRegionTower(nn.Module):
    """BERT layers over [CLS], tags, [SEP] and regions. Tags are embedded as words are, with a type of their own;
    regions have neither position nor type, where they lie is part of their features.

    Args:
        embeddings: those of the text tower.
        tag_head: whether tags are predicted (MCR).
    """

    mask_token = None

    def __init__(self, run: Run, embeddings: Embeddings, *, tag_head: bool):
        super().__init__()
        assert run.regions is not None
        text = run.text
        # Not a submodule: its parameters belong to the text tower, and a state has each of them once.
        self.__dict__["embeddings"] = embeddings
        self.features = None if run.regions.source is RegionSource.column else RegionFeatures(None)
        width = self.features.width if self.features is not None else run.regions.width
        assert width is not None
        self.width = text.width
        # BERT's second token type, less the first one, which is part of the positions.
        self.tag_type = nn.Parameter(torch.empty(text.width).normal_(std=0.02))
        self.regions = nn.Linear(width + STYLES[STYLE], text.width)
        self.dropout = Dropout(text.dropout)
        self.encoder = Stack(text.depth // 2, text.width, text.heads, text.ffn, text.dropout, None)
        self.tag_head = MlmHead(text.width, embeddings.word_embeddings.num_embeddings) if tag_head else None
        self.apply(bert_init)

    def forward(
        self,
        image: Tensor,
        tag_ids: Tensor,
        regions: Tensor | None,
        region_boxes: Tensor,
        region_mask: Tensor,
    ) -> Tensor:
        """Tokens (B, 1 + R, D): [CLS] and the regions, of which rows of zeros are not there; arguments as ``Batch`` has
        them.
        """
        tags = self.embeddings.word_embeddings(tag_ids)
        states = self.states(tags, tag_ids != 0, self.look(image, regions, region_boxes), region_boxes, region_mask)
        seen = states[:, tag_ids.shape[1] :] * region_mask[:, :, None]
        return torch.cat([states[:, :1], seen], 1)

    def look(self, image: Tensor, regions: Tensor | None, region_boxes: Tensor) -> Tensor:
        """Features of regions, (B, R, d): a column's, or made from the image.

        Raises:
            UserError: the run reads a column, and there is none.
        """
        if self.features is not None:
            return self.features(image, region_boxes)
        if regions is None:
            raise UserError("regions.source: column reads region_feats; a picture without them cannot be used")
        return regions

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


class FusedStage(nn.Module):
    """The layers over states of both towers, and the pooler of the text's [CLS]."""

    def __init__(self, run: Run, *, pooled: bool):
        super().__init__()
        text = run.text
        depth = text.depth - text.depth // 2
        self.encoder = Stack(depth, text.width, text.heads, text.ffn, text.dropout, None)
        self.apply(bert_init)
        # Not BERT's start: at small widths that would leave ITM a fraction of its gradient (see ``Merging``).
        self.pooler = nn.Linear(text.width, text.width) if pooled else None

    def forward(self, words: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The text tower's states (n, L, D) with their mask (n, L) over an image's tokens (n, 1 + R, D) -> the texts'
        (n, L, D); the image's own [CLS] stays behind.
        """
        return self.encoder(*_joined(words, mask, tokens))[:, : words.shape[1]]

    def cls(self, words: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """As ``forward`` -> (n, D), the text's [CLS]; of the last layer nothing else is computed."""
        first = torch.zeros(len(words), 1, dtype=torch.int64, device=words.device)
        (cls,) = self.encoder(*_joined(words, mask, tokens), reads=[Read(slice(None), first)])
        return cls[:, 0]

    def pool(self, cls: Tensor) -> Tensor:
        """(n, D) -> (n, D)"""
        assert self.pooler is not None
        return self.pooler(cls).tanh()


def _joined(words: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    regions = tokens[:, 1:]
    return torch.cat([words, regions], 1), torch.cat([mask, regions.detach().ne(0).any(-1)], 1)

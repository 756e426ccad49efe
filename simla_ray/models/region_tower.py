"""UNITER's image embedder: features of regions, and where they lie, as tokens (official ``model/model.py``,
``UniterImageEmbeddings``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simla_ray.config.schema import Run
from simla_ray.models.dropout import Dropout
from simla_ray.models.regions import STYLES, RegionSide, box_geometry
from simla_ray.models.stack import LAYER_NORM_EPS

STYLE = "seven"


class RegionTower(RegionSide):
    """LN(LN(features) + LN(geometry) + type) of each region, (B, R, D); no tower, but where the others have one.

    Regions that are not there become rows of zeros, and by these whoever reads the tokens knows them: no other token
    is zero behind a LayerNorm. Of a picture that comes without boxes the regions are the cells of the grid.

    Args:
        maskable: with the vector that takes the place of hidden features.
    """

    mask_token = None

    def __init__(self, run: Run, *, maskable: bool):
        super().__init__(run)
        features, width = self.feature_width, run.text.width
        self.width, self.saves_memory = width, False
        self.img_linear = nn.Linear(features, width)
        self.img_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pos_linear = nn.Linear(STYLES[STYLE], width)
        self.pos_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.type_embedding = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.mask_embedding = nn.Parameter(torch.empty(features).normal_(std=0.02)) if maskable else None
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(run.text.dropout)

    def forward(
        self,
        image: Tensor,
        regions: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, R, D); arguments as ``Batch`` has them."""
        boxes = self.boxes_of(image, region_boxes)
        return self.embed(self.look(image, regions, boxes), boxes, region_mask)

    def embed(
        self, features: Tensor, region_boxes: Tensor, region_mask: Tensor | None, hidden: Tensor | None = None
    ) -> Tensor:
        """features (B, R, d), boxes (B, R, 4), mask (B, R) -> (B, R, D).

        ``hidden`` (B, R) bool: regions of which only the box is shown; the mask vector stands in for their features.
        """
        if hidden is not None:
            assert self.mask_embedding is not None
            features = torch.where(hidden[:, :, None], self.mask_embedding.to(features.dtype), features)
        where = box_geometry(region_boxes.to(features.dtype), STYLE)
        seen = self.img_layer_norm(self.img_linear(features)) + self.pos_layer_norm(self.pos_linear(where))
        tokens = self.dropout(self.LayerNorm(seen + self.type_embedding))
        return tokens if region_mask is None else tokens * region_mask[:, :, None]


class RegionRegression(nn.Module):
    """From the state of a hidden region to its features, through the embedder's own weights, transposed (official
    ``model/pretrain.py``, ``RegionFeatureRegression``)."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.transform = _transform(width)
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, states: Tensor, weight: Tensor) -> Tensor:
        """states (..., D), weight (D, d) -> (..., d)"""
        return nn.functional.linear(self.transform(states), weight.t(), self.bias)


def region_classifier(width: int, classes: int) -> nn.Sequential:
    """(..., D) -> (..., C); class 0 is background (official ``RegionClassification``)."""
    return nn.Sequential(*_transform(width), nn.Linear(width, classes))


def _transform(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=LAYER_NORM_EPS))

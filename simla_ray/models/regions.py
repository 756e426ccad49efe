"""Features of regions, and where regions lie as the methods write it down."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from simla_ray.config.schema import RegionSource, Run
from simla_ray.errors import UserError
from simla_ray.models.vision import MEAN, STD, VisionTower

#: Style of ``box_geometry`` -> its numbers: MVPTR's and UNITER's.
STYLES = {"six": 6, "seven": 7}
#: A region's own pixels are averaged to this many a side.
CELLS = 8


def box_geometry(boxes: Tensor, style: Literal["six", "seven"]) -> Tensor:
    """Boxes (..., 4), x1, y1, x2, y2 in shares of the image -> (..., 6 or 7).

    six: x1, y1, x2, y2, w, h (MVPTR, ``tools/img_feat_extract.py``); seven: these and w * h (UNITER, ``data/data.py``).
    """
    size = boxes[..., 2:] - boxes[..., :2]
    parts = [boxes, size]
    if style == "seven":
        parts.append(size.prod(-1, keepdim=True))
    return torch.cat(parts, -1)


def average_under(maps: Tensor, boxes: Tensor, cells: int = 1) -> Tensor:
    """What maps show under boxes: means by area, of which a pixel that is half inside counts half.

    Args:
        maps: (B, C, h, w); boxes: (B, R, 4) in shares of the map. A box without area gives zeros.
        cells: each box is cut into cells x cells equal parts.

    Returns:
        (B, R, C, cells, cells)
    """
    x = _shares(boxes[..., 0], boxes[..., 2], cells, maps.shape[3]).to(maps.dtype)
    y = _shares(boxes[..., 1], boxes[..., 3], cells, maps.shape[2]).to(maps.dtype)
    rows = torch.einsum("brkh,bchw->brckw", y, maps)
    return torch.einsum("brckw,brlw->brckl", rows, x)


def _shares(low: Tensor, high: Tensor, cells: int, n: int) -> Tensor:
    """(B, R) from and to, in 0..1 -> (B, R, cells, n): the share of each of n pixels in the mean of each cell."""
    step = (high - low)[..., None] / cells
    start = (low[..., None] + step * torch.arange(cells, device=low.device)) * n
    pixel = torch.arange(n, device=low.device)
    inside = torch.minimum((start + step * n)[..., None], pixel + 1) - torch.maximum(start[..., None], pixel)
    inside = inside.clamp(min=0)
    return inside / inside.sum(-1, keepdim=True).clamp(min=torch.finfo(inside.dtype).tiny)


def grid_cells(side: int) -> Tensor:
    """(side^2, 4) float32, the cells of ``data.regions.grid_boxes``."""
    at = torch.arange(side, dtype=torch.float32) / side
    y, x = (a.flatten() for a in torch.meshgrid(at, at, indexing="ij"))
    return torch.stack([x, y, x + 1 / side, y + 1 / side], 1).clamp(0, 1)


class RegionFeatures(nn.Module):
    """Frozen features of the regions of an image, (B, R, width) float32.

    With a tower the mean of its patch tokens under each box; without one the region's own pixels, averaged to 8 x 8,
    in units of the towers' normalisation. Neither gets a gradient: they are what a detector's features are to the
    published methods, and targets at that.
    """

    def __init__(self, tower: VisionTower | None):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval() if tower is not None else None
        self.width: int = tower.width if tower is not None else 3 * CELLS**2
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> RegionFeatures:
        """Frozen: always in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        """image (B, 3, px, px) uint8, or normalised float; boxes (B, R, 4) -> (B, R, width)."""
        with torch.autocast(image.device.type, enabled=False):
            if self.tower is not None:
                tokens = self.tower(image)[:, 1:].float()
                side = round(tokens.shape[1] ** 0.5)
                maps = tokens.transpose(1, 2).unflatten(2, (side, side))
                return average_under(maps, boxes)[..., 0, 0]
            pixels = image if image.is_floating_point() else (image - self.mean) / self.std
            return average_under(pixels, boxes, CELLS).flatten(2)


class RegionSide(nn.Module):
    """The image side of a model whose images are made of regions: what their features are and where regions lie.

    Attributes:
        features: makes them from the image; None where they are a column's.
        feature_width: numbers of a feature, d.
    """

    cells: Tensor

    def __init__(self, run: Run):
        super().__init__()
        regions = run.regions
        assert regions is not None
        self.features = None
        if regions.source is not RegionSource.column:
            described = regions.tower
            self.features = RegionFeatures(VisionTower(described, maskable=False) if described is not None else None)
        width = self.features.width if self.features is not None else regions.width
        assert width is not None
        self.feature_width: int = width
        self.register_buffer("cells", grid_cells(regions.grid), persistent=False)

    def boxes_of(self, image: Tensor, region_boxes: Tensor | None) -> Tensor:
        """(B, R, 4); of pictures (B, 3, px, px) that come without boxes the cells of the grid."""
        return self.cells.expand(len(image), -1, -1) if region_boxes is None else region_boxes

    def look(self, image: Tensor, regions: Tensor | None, region_boxes: Tensor) -> Tensor:
        """Features of regions, (B, R, d), without a gradient: a column's, or made from the image.

        Raises:
            UserError: the run reads a column, and there is none.
        """
        if self.features is not None:
            return self.features(image, region_boxes)
        if regions is None:
            raise UserError("regions.source: column reads region_feats; a picture without them cannot be used")
        return regions.to(self.cells.dtype)

"""Frozen visual tokenizers: picture -> the discrete codes that MIM predicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simla_ray.models.vision import VisionTower


class PatchCodes(nn.Module):
    """Nearest of K centroids, over the pixels of a patch or over a frozen tower's patch features.

    ``centroids`` (K, d); pixels are RGB in 0..1, d = 3 * patch_px^2.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, patch_px: int, tower: VisionTower | None = None):
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.patch_px = patch_px
        self.tower = tower.requires_grad_(False).eval() if tower is not None else None

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(C, 3, px, px) uint8 -> (C, P) int64"""
        features = self.features(image)
        c = self.centroids
        # In bfloat16 a third of the patches would get another code.
        with torch.autocast(image.device.type, enabled=False):
            return (features @ c.T - (c**2).sum(1) / 2).argmax(-1)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """(C, 3, px, px) uint8 -> (C, P, d) float32"""
        if self.tower is not None:
            return self.tower(image)[:, 1:].float()
        p = self.patch_px
        patches = image.float().div(255).unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (C, 3, rows, p, columns, p)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

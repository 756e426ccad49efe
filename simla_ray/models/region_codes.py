"""Classes of regions where no annotation names them: a codebook of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RegionCodes(nn.Module):
    """Soft classes of features by their distances to K centroids [ours], (..., K + 1); class 0, background, is none.

        p_k = softmax_k(-|f - c_k|^2 / spread)

    The centroids are k-means' over features of the training images; ``spread`` is the mean squared distance of those
    features to their own centroids, so that a feature in the middle of its cluster is nearly sure of it, and one
    between two is of both. They are buffers: a checkpoint has them.
    """

    centroids: Tensor
    spread: Tensor

    def __init__(self, n: int, width: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(n, width))
        self.register_buffer("spread", torch.ones(()))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(..., d) -> (..., K + 1) float32 at least"""
        with torch.autocast(features.device.type, enabled=False):
            c = self.centroids.to(features.dtype)
            distance = (features**2).sum(-1, keepdim=True) - 2 * features @ c.T + (c**2).sum(1)
            classes = (-distance / self.spread.to(features.dtype)).softmax(-1)
        return nn.functional.pad(classes, (1, 0))

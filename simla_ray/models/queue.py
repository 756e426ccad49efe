"""Ring buffer of projected teacher features: the extra negatives of ITC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """``image`` and ``text`` (Q, E) with unit rows, ``ids`` (Q,) the image ids of the rows, -1 where none is known.

    Row-major and written in place (the official code keeps (E, Q) and clones it in every step). There is no pointer to
    keep: Q is a multiple of the global batch, so the place follows from the step.
    """

    image: Tensor
    text: Tensor
    ids: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("image", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("text", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64))

    @torch.no_grad()
    def write(self, image: Tensor, text: Tensor, ids: Tensor, at: int) -> None:
        """Write a global batch (G, E), (G, E),
        (G,) from row ``at`` on; rows with non-finite features keep the old ones.
        """
        rows = slice(at, at + len(image))
        good = (image.isfinite().all(1) & text.isfinite().all(1))[:, None]
        self.image[rows] = torch.where(good, image.to(self.image.dtype), self.image[rows])
        self.text[rows] = torch.where(good, text.to(self.text.dtype), self.text[rows])
        self.ids[rows] = torch.where(good[:, 0], ids, self.ids[rows])

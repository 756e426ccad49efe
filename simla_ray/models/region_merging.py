"""Words and regions side by side in one BERT (UNITER, arXiv 1909.11740).

Official UNITER packs a text's words and its regions without padding between them; ours are padded each by itself.
Attention does not see padding, so the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simla_ray.errors import UserError
from simla_ray.models.stack import Attentions, Read, Stack


class RegionMerging(nn.Module):
    """The pooler of the text's [CLS], and the passes of embedded words and regions through the text model's layers.

    Region tokens are as ``RegionTower`` gives them: rows of zeros are not there.
    """

    def __init__(self, width: int, *, pooled: bool):
        super().__init__()
        self.pooler = nn.Linear(width, width) if pooled else None

    def forward(
        self, stack: Stack, words: Tensor, mask: Tensor, regions: Tensor, keep: Attentions | None = None
    ) -> tuple[Tensor, Tensor]:
        """words (n, L, D) with their mask (n, L), regions (n, R, D) -> the states of both."""
        if keep is not None and keep.want_cross:
            raise UserError("maps: an image that is made of regions has no patches to draw one over")
        states, allowed = joined(words, mask, regions)
        states = stack(states, allowed)
        return states[:, : words.shape[1]], states[:, words.shape[1] :]

    def cls(self, stack: Stack, words: Tensor, mask: Tensor, regions: Tensor) -> Tensor:
        """As ``forward`` -> (n, D), the text's [CLS]; of the last layer nothing else is computed."""
        first = torch.zeros(len(words), 1, dtype=torch.int64, device=words.device)
        return self.read(stack, words, mask, regions, [Read(slice(None), first)])[0][:, 0]

    def read(self, stack: Stack, words: Tensor, mask: Tensor, regions: Tensor, reads: Sequence[Read]) -> list[Tensor]:
        """States at the positions that are wanted of the last layer; regions come after the L words."""
        states, allowed = joined(words, mask, regions)
        return stack(states, allowed, reads=list(reads))

    def pool(self, cls: Tensor) -> Tensor:
        """(n, D) -> (n, D)"""
        assert self.pooler is not None
        return self.pooler(cls).tanh()


def joined(words: Tensor, mask: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """(n, L + R, D), and who is there, (n, L + R) bool."""
    return torch.cat([words, regions], 1), torch.cat([mask, are_there(regions)], 1)


def are_there(regions: Tensor) -> Tensor:
    """Tokens (n, R, D) -> (n, R) bool"""
    return regions.detach().ne(0).any(-1)

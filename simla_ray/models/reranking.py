"""ITM's states of many pairs of images and texts: what one of the two gives alone is computed once, whoever it meets.

Of an image that is the keys and values of every fusion layer; of a text its states up to the first cross-attention,
which with fusion in the upper half includes the language encoder. What a pair still costs is the rest, in the last
layer for [CLS] alone. The official code (``Retrieval.py``, ``evaluation``) runs every candidate from its token ids and
projects the image's tokens once per candidate; the values are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simla_ray.models.model import Towers
from simla_ray.models.stack import Layer
from simla_ray.models.text import TextModel

PAIRS, TEXTS = 256, 256
#: Keys and values that are held at a time: of as many images as fit, at least one.
MEMORY_BYTES = 2**29


class TextStarts:
    """The texts ids (T, L), mask (T, L), and their states before the first cross-attention, (T, L, D).

    States are computed in fixed blocks when one of a block is first asked for, and kept: they are the same to the last
    bit, whichever pairs come first. At 768 wide a text of 25 tokens takes 77 kB.
    """

    def __init__(self, text: TextModel, ids: Tensor, mask: Tensor):
        self.text, self.ids, self.mask = text, ids, mask
        self.lengths = mask.sum(1).cpu().numpy()
        self._known = np.zeros(-(-len(ids) // TEXTS), bool)
        self._states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @torch.no_grad()
    def of(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """States (n, l, D) and mask (n, l) of these texts, l that of the longest of them."""
        for block in np.unique(numbers // TEXTS):
            if not self._known[block]:
                self._compute(slice(block * TEXTS, (block + 1) * TEXTS))
                self._known[block] = True
        assert self._states is not None
        length = int(self.lengths[numbers].max())
        index = torch.from_numpy(numbers).to(self.ids.device)
        return self._states[:, :length].index_select(0, index), self.mask[:, :length].index_select(0, index)

    def _compute(self, rows: slice) -> None:
        ids, mask = self.ids[rows], self.mask[rows]
        states = self.text.embeddings(ids)
        if self.text.split:
            states = self.text.encoder(states, mask, layers=self.text.language_layers)
        # Merged, and in two stages, words meet the image in layers that are not the language encoder's.
        if not self.text.merged and self.text.fusion_layers.start < len(self.text.encoder.layer):
            first = self.text.encoder.layer[self.text.fusion_layers.start].attention
            states = first(states, *first.project(states), mask)
        if self._states is None:
            self._states = states.new_empty(len(self), *states.shape[1:])
        self._states[rows] = states


@torch.no_grad()
def fused_cls(
    image_tokens: Tensor, starts: TextStarts, image: np.ndarray, text: np.ndarray, batch_size: int = PAIRS
) -> Tensor:
    """The multimodal encoder's [CLS] of n > 0 pairs -> (n, D).

    Args:
        image_tokens: (m, N, D).
        image, text: (n,) rows of ``image_tokens`` and of ``starts``, in any order.
        batch_size: pairs that pass through the layers together; those of about the same length do.
    """
    layers = list(starts.text.encoder.layer[starts.text.fusion_layers])
    per_image = np.bincount(image, minlength=len(image_tokens))
    by_pairs = np.argsort(per_image, kind="stable")  # images with as many pairs are read in one call
    used = by_pairs[per_image[by_pairs] > 0]
    bytes_each = (
        2 * len(layers) * image_tokens.shape[1] * layers[0].output.dense.out_features * image_tokens.element_size()
    )
    found, places = [], []
    for some in np.array_split(used, -(-len(used) // max(1, MEMORY_BYTES // bytes_each))):
        tokens = image_tokens.index_select(0, torch.from_numpy(some).to(image_tokens.device))
        memory = [layer.crossattention.project(tokens) for layer in layers]
        row = np.full(len(image_tokens), -1)
        row[some] = np.arange(len(some))
        pairs = np.flatnonzero(row[image] >= 0)
        pairs = pairs[np.argsort(starts.lengths[text[pairs]], kind="stable")]
        for part in np.array_split(pairs, -(-len(pairs) // batch_size)):
            part = part[np.argsort(row[image[part]], kind="stable")]
            counts = np.bincount(row[image[part]], minlength=len(some)).tolist()
            found.append(_cls(layers, *starts.of(text[part]), memory, counts))
            places.append(part)
    back = np.argsort(np.concatenate(places))
    return torch.cat(found).index_select(0, torch.from_numpy(back).to(image_tokens.device))


@torch.no_grad()
def merged_cls(
    towers: Towers,
    image_tokens: Tensor,
    starts: TextStarts,
    image: np.ndarray,
    text: np.ndarray,
    batch_size: int = PAIRS,
) -> Tensor:
    """``fused_cls`` of one stack over words and patches, or over states of both towers: nothing beyond these can be
    shared by pairs."""
    merging, found = towers.merging, []
    assert merging is not None
    order = np.argsort(starts.lengths[text], kind="stable")
    for part in np.array_split(order, -(-len(order) // batch_size)):
        patches = image_tokens.index_select(0, torch.from_numpy(image[part]).to(image_tokens.device))
        found.append(merging.cls(towers.layers, *starts.of(text[part]), patches))
    back = torch.from_numpy(np.argsort(order)).to(image_tokens.device)
    return torch.cat(found).index_select(0, back)


def _cls(
    layers: Sequence[Layer],
    states: Tensor,
    mask: Tensor,
    memory: Sequence[tuple[Tensor, Tensor]],
    counts: Sequence[int],
) -> Tensor:
    """states (n, L, D) before the first cross-attention, mask (n, L); of each layer keys and values of some images, of
    which the next ``counts`` rows read one after the other -> (n, D)."""
    for layer, key_value in zip(layers, memory, strict=True):
        # Products of strided rows are others, in their last bit, for weights that are trained and for frozen ones.
        wanted = states[:, :1].contiguous() if layer is layers[-1] else states
        if layer is not layers[0]:
            wanted = layer.attention(wanted, *layer.attention.project(states), mask)
        states = layer.feed_forward(layer.crossattention.in_turn(wanted, *key_value, counts))
    return states[:, 0]

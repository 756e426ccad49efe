"""Which words and patches are masked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MaskedWords:
    ids: np.ndarray  # (L,) the masked view
    chosen: np.ndarray  # (L,) bool


def mask_words(
    ids: np.ndarray,
    maskable: np.ndarray,
    p: float,
    mask_id: int,
    vocab_size: int,
    rng: np.random.Generator,
    word_start: np.ndarray | None = None,
) -> MaskedWords:
    """Choose each maskable token with probability p; of the chosen 80 % become [MASK], 10 % a random id, 10 % stay.

    Special tokens and padding are never maskable (official ``mask``). A caption may end up without a chosen token.

    Args:
        word_start: (L,) position of the first piece of each token's word. Given, words are chosen, with all their
            pieces; what becomes of a chosen piece is its own, as in ViLT, whose collator draws words until p of the
            tokens are chosen.
    """
    drawn = rng.random(len(ids))
    chosen = ((drawn if word_start is None else drawn[word_start]) < p) & maskable
    fate = rng.random(len(ids))
    random_ids = rng.integers(0, vocab_size, len(ids))
    masked = np.where(chosen & (fate < 0.8), mask_id, ids)
    masked = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random_ids, masked)
    return MaskedWords(masked, chosen)


#: A region that shows more than this share of a hidden one is hidden with it.
SHOWN = 0.5


def mask_regions(boxes: np.ndarray, p: float, rng: np.random.Generator, *, overlaps: bool) -> np.ndarray:
    """Choose each region with probability p, and one at random where none is (official ``data/mrm.py``) -> (R,) bool.

    Args:
        boxes: (R, 4).
        overlaps: hide what shows a hidden region, too [ours]: features that are made from the image would let it be
            read off next door. A detector's are left as they are published.
    """
    chosen = rng.random(len(boxes)) < p
    if not chosen.any():
        chosen[int(rng.integers(len(boxes)))] = True
    if not overlaps:
        return chosen
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return chosen | (shared[chosen] > SHOWN * area[chosen, None]).any(0)


def mask_patches(grid: int, n_mask: int, rng: np.random.Generator) -> np.ndarray:
    """BEiT's blockwise masking on a grid x grid map (official ``masking_generator.py``) -> (grid * grid,) bool.

    Blocks of at least 1/16 of the map (16 of 256 patches in the official code, at least one patch here) and aspect
    0.3..1/0.3 are laid until n_mask patches are masked or a round of 10 attempts adds none: at most n_mask, often
    fewer.
    """
    mask = np.zeros((grid, grid), dtype=bool)
    smallest = max(1, grid * grid // 16)
    log_aspect = math.log(0.3)
    while (left := n_mask - int(mask.sum())) > 0:
        for _ in range(10):
            area = rng.uniform(min(smallest, left), left)
            aspect = math.exp(rng.uniform(log_aspect, -log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < grid and 0 < w < grid):
                continue
            top, side = int(rng.integers(0, grid - h + 1)), int(rng.integers(0, grid - w + 1))
            block = mask[top : top + h, side : side + w]
            added = block.size - int(block.sum())
            if 0 < added <= left:
                block[:] = True
                break
        else:
            break
    return mask.ravel()

"""What the floors hand to each other.

Shape legend, used in comments and in suffixes of tensor names everywhere:

    B  pairs of a micro-batch      L  text tokens (padded)         V  vocabulary (word pieces)
    P  patches of an image         N  image tokens, P + 1          K  visual codes
    D  width of a tower            E  width of the joint space     Q  queued keys
    H  attention heads             M  masked positions of a row, padded; weight 0 marks padding
    G  tokens of an image's tags (padded)
    A  tokens of an answer, its start and its end included (padded)
    R  regions of an image (padded)
    C  rows of the micro-batch that get a masked image (``mim.batch_fraction``), the first C of B
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch: everything the step needs, so that it never has to wait for the device."""

    image: Tensor  # (B, 3, px, px) uint8; float is taken as already normalised
    token_ids: Tensor  # (B, L) int64
    token_mask: Tensor  # (B, L) bool, False on padding
    masked_ids: Tensor  # (B, L) int64, the MLM view of token_ids
    mlm_index: Tensor  # (B, M) int64, chosen positions
    mlm_weight: Tensor  # (B, M) float32
    mlm_label: Tensor  # (B, M) int64, the true ids there
    patch_mask: Tensor  # (C, P) bool
    mim_index: Tensor  # (C, M) int64, masked patches
    mim_weight: Tensor  # (C, M) float32
    word_start: Tensor  # (B, L) int64, position of the first piece of the word a piece belongs to
    keyword_ok: Tensor  # (B, L) bool, may become a keyword
    keyword_prior: Tensor  # (B, L) float32, score of psl.select controls; zeros with attention
    image_id: Tensor  # (B,) int64, equal for captions of one image
    second_image: Tensor | None = None  # (B, 3, px, px) uint8, of statements about two pictures
    answer_ids: Tensor | None = None  # (B, A) int64: [CLS], an answer's pieces, [SEP], padding
    label: Tensor | None = None  # (B,) int64: class of a statement, or number of a known answer
    is_concept: Tensor | None = None  # (B, L) bool, phrase concepts behind the words
    tag_ids: Tensor | None = None  # (B, G) int64: [CLS], tags, [SEP], padding
    masked_tag_ids: Tensor | None = None  # (B, G) int64, the MCR view of tag_ids
    mcr_index: Tensor | None = None  # (B, M) int64, chosen tags
    mcr_weight: Tensor | None = None  # (B, M) float32
    regions: Tensor | None = None  # (B, R, d) float32, features of a column; None: made from the image
    region_boxes: Tensor | None = None  # (B, R, 4) float32, x1, y1, x2, y2 in 0..1 of the image; zeros in padding
    region_mask: Tensor | None = None  # (B, R) bool, False on padding
    region_hidden: Tensor | None = None  # (B, R) bool, masked for the objectives over regions
    mrm_index: Tensor | None = None  # (B, M) int64, hidden regions
    mrm_weight: Tensor | None = None  # (B, M) float32
    region_class: Tensor | None = None  # (B, R) int64, 0 for background; None: the codes of their features are classes
    code_image: Tensor | None = None  # (C, 3, px, px) uint8, what the visual codes are read from; None: `image`
    codes: Tensor | None = None  # (C, P) int64, given codes; None: the visual tokenizer makes them
    uid: list[str] = field(default_factory=list)  # host side: who is in here
    epoch: list[int] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies do not block the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU run beside the step."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        named: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in named.items():
            if isinstance(value, Tensor):
                named[name] = change(value)
        return Batch(**named)

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class LossTerm:
    """What an objective returns: ``loss`` enters the total; ``metrics`` are detached scalars, still on the device.

    ``metrics["hard"]`` is the part against the true targets: unlike the loss it does not move with soft_alpha.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class EvalResult:
    """Result of one evaluation task: numbers for the table and the summary, and what its figures are drawn from.

    ``intervals`` has the names of ``metrics``, nested like them, with [low, high] in place of the numbers; a metric
    that is no mean over cases has none. ``per_image`` has by a metric's path ("itc/t2i_r10") what each image gives to
    it, (images, 2) float32: the metric is the sum of the first column over that of the second. ``uids``, of the task
    ``data`` alone, says which images these are, in their order.
    """

    task: str
    metrics: dict[str, Any]
    examples: list[dict[str, Any]] = field(default_factory=list)
    intervals: dict[str, Any] = field(default_factory=dict)
    per_image: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    uids: tuple[str, ...] = ()


def with_intervals(metrics: dict[str, Any], intervals: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a task as summaries hold them: with its intervals, where it has some, under ``intervals``."""
    return metrics | {"intervals": intervals} if intervals else metrics

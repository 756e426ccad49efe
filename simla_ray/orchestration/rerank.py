"""What a candidate costs in re-ranking: ours against the whole stack from token ids for every candidate.

Every image meets every text, as a shortlist of both directions has it many times over: with 5 captions an image and
128 candidates a query, an image meets 128 captions that it found and some 640 that found it. The plain way repeats the
image's tokens for each candidate, as the official code does (``Retrieval.py``, ``evaluation``). Image tokens are given
to both, texts have no padding, weights are random; both do the candidates of one image at a time, in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simla_ray.config.load import load_run
from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.models.model import vision_width
from simla_ray.models.reranking import TextStarts, fused_cls
from simla_ray.models.stack import Memory
from simla_ray.models.text import TextModel
from simla_ray.training import measure
from simla_ray.training.contenders import SHAPES
from simla_ray.training.measure import Spread

OURS, PLAIN = "simla_ray", "plain"
#: Texts that every image meets.
TEXTS = 100
#: Candidates of a pass that is not counted.
WARM_UP = 8


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        shape: one of ``SHAPES``.
        px: sides of the images.
        candidates: pairs of an image and a text, ``TEXTS`` an image.

    Raises:
        UserError: a value that cannot be; names the option.
    """

    shape: str = "base"
    px: tuple[int, ...] = (384, 256)
    candidates: int = 4000

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(f"--shape: {self.shape} is not one of {', '.join(SHAPES)}")
        for side in self.px:
            if not 16 <= side <= 4096:
                raise UserError(f"--px: {side} is not in 16..4096")
        if not TEXTS <= self.candidates <= 10**6 or self.candidates % TEXTS:
            raise UserError(f"--candidates: {self.candidates} is not a multiple of {TEXTS} in {TEXTS}..1000000")

    def run(self, side: int) -> Run:
        """The run whose text stack is measured on images of this side; with what retrieval is trained on."""
        others = {f"objectives.{name}": None for name in ("mlm", "mim", "psl")}
        return load_run(overrides=SHAPES[self.shape].keys | others | {"vision.image_px": side})


def measure_rerank(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Time both ways side by side, on one CPU thread in float32.

    Returns:
        what ``--json`` prints: for each side ``ratio``, our CPU seconds over the plain way's, with its range over the
        images, seconds of both, and the largest difference of a logit; and the conditions.

    Raises:
        UserError: a side that the shape cannot have.
    """
    torch.set_num_threads(1)
    runs = {side: plan.run(side) for side in plan.px}
    what, tokens = SHAPES[plan.shape].what, next(iter(runs.values())).text.max_tokens
    say(f"measure    {what}, texts of {tokens} tokens; one CPU thread, fp32, torch {torch.__version__}")
    found: dict[str, Any] = {str(side): _side(plan, run, say) for side, run in runs.items()}
    setting = {"shape": plan.shape, "what": what, "tokens": tokens, "candidates": plan.candidates, "texts": TEXTS}
    return found | {"setting": setting | {"device": "cpu", "precision": "fp32", "torch": torch.__version__}}


def _side(plan: Plan, run: Run, say: Callable[[str], None]) -> dict[str, Any]:
    pairs = _Pairs.of(run, SHAPES[plan.shape].vocab_size, plan.candidates // TEXTS)
    images, image_tokens = pairs.image_tokens.shape[:2]
    say(f"alternate  {run.vision.image_px} px: {images} images of {image_tokens} tokens with {TEXTS} texts each")
    ours, plain = _ours(pairs), _plain(pairs)
    for way in (_ours(pairs), plain):  # ours counts what it computes once, too
        way.logits(0, WARM_UP)
    seconds = measure.interleaved({OURS: ours, PLAIN: plain}, images, torch.device("cpu"), say, warm_up=0)
    ratio = Spread.of_ratio(seconds[OURS], seconds[PLAIN])
    return {
        "ratio": sum(seconds[OURS]) / sum(seconds[PLAIN]),
        "ratio_range": [ratio.low, ratio.high],
        "seconds_per_candidate": {name: sum(times) / plan.candidates for name, times in seconds.items()},
        "largest_difference": float((torch.cat(ours.found) - torch.cat(plain.found)).abs().max()),
        "images": images,
        "image_tokens": image_tokens,
    }


@dataclass(frozen=True)
class _Pairs:
    """Random weights, image_tokens (images, N, D) and texts ids (TEXTS, L) without pads."""

    text: TextModel
    head: nn.Module
    image_tokens: Tensor
    ids: Tensor

    @classmethod
    def of(cls, run: Run, vocab_size: int, images: int) -> _Pairs:
        torch.manual_seed(0)
        width = vision_width(run)
        text = TextModel(run.text, vocab_size, memory_width=width, mlm_head=False).eval()
        tokens = torch.randn(images, run.grid**2 + 1, width)
        ids = torch.randint(measure.FIRST_WORD, vocab_size, (TEXTS, run.text.max_tokens))
        return cls(text, nn.Linear(run.text.width, 2), tokens, ids)

    @property
    def mask(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool)


@dataclass
class _Way:
    """One way from tokens (1, N, D) of an image and some texts (n,) to their [CLS] (n, D); a call does the next image
    with all texts."""

    pairs: _Pairs
    cls: Callable[[Tensor, np.ndarray], Tensor]
    found: list[Tensor] = field(default_factory=list)

    def __call__(self) -> None:
        self.found.append(self.logits(len(self.found), TEXTS))

    @torch.no_grad()
    def logits(self, image: int, texts: int) -> Tensor:
        """(texts, 2) of an image and the first texts."""
        return self.pairs.head(self.cls(self.pairs.image_tokens[image : image + 1], np.arange(texts)))


def _ours(pairs: _Pairs) -> _Way:
    starts = TextStarts(pairs.text, pairs.ids, pairs.mask)
    return _Way(pairs, lambda tokens, texts: fused_cls(tokens, starts, np.zeros_like(texts), texts))


def _plain(pairs: _Pairs) -> _Way:
    def cls(tokens: Tensor, texts: np.ndarray) -> Tensor:
        memory = Memory(tokens.repeat(len(texts), 1, 1))
        return pairs.text.encode(pairs.ids[texts], pairs.mask[texts], memory)[:, 0]

    return _Way(pairs, cls)

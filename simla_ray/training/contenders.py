"""What the benchmark of steps lets take turns: our step, and through a ``Reference`` the unfused one.

The unfused step and the ways to undo a saving are no part of the package: they are kept with the tests, and handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from simla_ray.config.load import load_run
from simla_ray.config.schema import Method, Run
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast_dtype
from simla_ray.objectives.terms import itm_eps_at
from simla_ray.training import measure
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step, active_at, alphas_at
from simla_ray.types import Batch

#: Steps are numbered from the middle of a run of this length: ramps are over, every objective is on.
TOTAL_STEPS = 1000
FIRST_STEP = TOTAL_STEPS // 2
QUEUE = 65536


@dataclass(frozen=True)
class Shape:
    """A size to measure at: keys of the config, word pieces, queue, and the batch on a CPU and on a GPU."""

    what: str
    keys: dict[str, Any]
    vocab_size: int
    queue: int
    batch: tuple[int, int]


_BASE = {"size": "base", "vision.pretrained": False, "text.weights": None}
_SMALL_VISION = {"vision.timm": "vit_small_patch16_224", "vision.image_px": 224}
_SMALL_TEXT = {"text.width": 384, "text.heads": 6, "text.ffn": 1536}
_TINY = {"size": "tiny", "schedule.kind": "joint", "schedule.phases": []}
SHAPES = {
    "cpu": Shape("ViT-S/16, 384-wide text", _BASE | _SMALL_VISION | _SMALL_TEXT, 30522, QUEUE, (4, 64)),
    "base": Shape("ViT-B/16, BERT-base", _BASE, 30522, QUEUE, (4, 64)),
    "tiny": Shape("the tiny preset", _TINY, 256, 0, (32, 32)),
}


class StepLike(Protocol):
    """An optimiser step with the call of our ``Step``."""

    @property
    def model(self) -> Model: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def __call__(self, step: int, batches: list[tuple[int, Batch]]) -> Any: ...


@dataclass(frozen=True)
class Saving:
    """A context in which our step does without one saving.

    ``counts``: its FLOPs are others then. ``device``: the only type of device where there is anything to save.
    """

    name: str
    undone: Callable[[], AbstractContextManager[Any]]
    counts: bool = False
    device: str | None = None


class Reference(Protocol):
    """What our step is measured against."""

    @property
    def savings(self) -> Sequence[Saving]: ...

    def step(self, run: Run, model: Model, total_steps: int, device: torch.device, *, fast: bool) -> StepLike:
        """The unfused step; ``fast`` with bfloat16 autocast and torch's fused attention, as its user would have it."""

    def total(self, run: Run, model: Model, batch: Batch) -> Tensor:
        """Its loss of a micro-batch on the meta device, a scalar."""


@dataclass
class Contender:
    """Something that takes its turn: a step, what it runs on, its FLOPs; ``around``: the context it runs in."""

    step: StepLike
    batch: Batch
    flops: int
    dtype: torch.dtype
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    number: int = FIRST_STEP

    def __call__(self) -> None:
        with self.around():
            self.step(self.number, [(0, self.batch)])
        self.number += 1


@dataclass(frozen=True)
class Workshop:
    """Builds contenders of one size on one device."""

    shape: Shape
    device: torch.device
    rows: int
    image_px: int | None = None
    compile: bool = False

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def run(self, method: Method = Method.simla, rows: int | None = None, *, compiled: bool | None = None) -> Run:
        """The run of a method, with micro-batches of ``rows`` and the longest queue that is a multiple of them."""
        rows = rows or self.rows
        keys = self.shape.keys | {
            "method": str(method),
            "batch.micro": rows,
            "batch.global": rows,
            "ray.workers": 1,
            "world.n_train": 4 * rows,
            "world.n_val": 4 * rows,
            "precision": "auto" if self.gpu else "fp32",
            "compile": self.compile if compiled is None else compiled,
        }
        if method in (Method.simla, Method.albef):
            keys["queue"] = self.shape.queue // rows * rows
        if self.image_px is not None:
            keys["vision.image_px"] = self.image_px
        return load_run(overrides=keys)

    def batch(self, run: Run, *, mixed: bool = False) -> Batch:
        """Noise with the longest captions; ``mixed``: of a third to four fifths of that, 8 to 20 of 25 tokens."""
        lengths, rows = None, run.batch.micro
        if mixed:
            lengths = [round(run.text.max_tokens * (0.32 + 0.48 * i / (rows - 1))) for i in range(rows)]
        return measure.synthetic_batch(run, self.shape.vocab_size, lengths)

    def ours(self, run: Run, batch: Batch) -> Contender:
        """Our step, on a model of its own."""
        torch.manual_seed(0)
        dtype = autocast_dtype(run, self.device) or torch.float32
        model = Model(run, self.shape.vocab_size, dtype).to(self.device)
        losses = Losses(run, model, None, measure.CLS_ID, None).train()
        step = Step(run, losses, TOTAL_STEPS, Comm(), self.device)
        return Contender(step, batch.to(self.device), self.flops(run, batch), dtype)

    def flops(self, run: Run, batch: Batch) -> int:
        """FLOPs of our step."""
        losses = Losses(run, self._on_meta(run), None, measure.CLS_ID, None).train()
        progress, on_meta = FIRST_STEP / TOTAL_STEPS, batch.to(torch.device("meta"))
        active, alphas = active_at(run, FIRST_STEP, TOTAL_STEPS), alphas_at(run, progress)
        eps = itm_eps_at(run.objectives.itm, progress)
        return measure.flops(lambda: losses(on_meta, active, alphas, eps)[0])

    def unfused(self, reference: Reference, run: Run, batch: Batch) -> dict[str, Contender]:
        """The unfused step as published, in float32; on a GPU also with what its user would switch on."""
        ways = {"unfused": False} | ({"unfused, bf16 + SDPA": True} if self.gpu else {})
        model, on_meta = self._on_meta(run).train(), batch.to(torch.device("meta"))
        flops = measure.flops(lambda: reference.total(run, model, on_meta))
        found = {}
        for name, fast in ways.items():
            torch.manual_seed(0)
            model = Model(run, self.shape.vocab_size).to(self.device).train()
            step = reference.step(run, model, TOTAL_STEPS, self.device, fast=fast)
            dtype = torch.bfloat16 if fast else torch.float32
            found[name] = Contender(step, batch.to(self.device), flops, dtype)
        return found

    def undone(self, saving: Saving, run: Run, ours: Contender) -> Contender:
        """Our step without a saving, on the same model."""
        flops = ours.flops
        if saving.counts:
            with saving.undone():
                flops = self.flops(run, ours.batch)
        return Contender(ours.step, ours.batch, flops, ours.dtype, saving.undone)

    def _on_meta(self, run: Run) -> Model:
        with torch.device("meta"):
            return Model(run, self.shape.vocab_size)

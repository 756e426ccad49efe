"""Our step without one of its savings: contexts that patch our classes, one saving each, with the same losses.

Each undoes its saving as far as the official code does without it, and leaves the others alone. What a saving is worth
is the difference that its context makes (``experiments/benchmark.py step --only savings``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ray.config.schema import Itm, Negatives
from simla_ray.models import dropout, forward, stack
from simla_ray.models.stack import Attention, Attentions, Memory, Read, Stack
from simla_ray.models.teacher import Teacher
from simla_ray.models.text import Embeddings, MlmHead, TextModel
from simla_ray.objectives import contrastive
from simla_ray.training.contenders import Saving
from simla_ray.training.step import Losses, Step
from simla_ray.types import Batch
from tests.reference import losses

# --- passes -----------------------------------------------------------------------------------------------------------


@contextmanager
def last_layer_rows() -> Iterator[None]:
    """The last layer computes all positions of all rows, and the MLM and MIM heads all positions of theirs."""
    run, mlm_head, linear = Stack.forward, MlmHead.forward, nn.Linear.forward

    def all_positions(
        self: Stack,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Memory | None = None,
        keep: Attentions | None = None,
        reads: list[Read] | None = None,
        layers: slice = slice(None),
    ) -> Any:
        states = run(self, hidden, mask, memory, keep, None, layers)
        return states if reads is None else [_picked(states[r.rows], r.at) for r in reads]

    def all_words(self: MlmHead, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        if not hasattr(hidden, "whole"):
            return mlm_head(self, hidden, word_embeddings)
        states, at = hidden.whole
        return _rows(mlm_head(self, states, word_embeddings), at)

    def all_patches(self: nn.Linear, x: Tensor) -> Tensor:
        if not hasattr(x, "whole"):
            return linear(self, x)
        states, at = x.whole
        return _rows(linear(self, states), at)

    heads = (MlmHead, "forward", all_words), (nn.Linear, "forward", all_patches)
    with _patched((Stack, "forward", all_positions), *heads):
        yield


def _picked(states: Tensor, at: Tensor) -> Tensor:
    """states (n, L, D) at (n, M), which remembers where it was picked from, so that a head can run on all of it."""
    found = _rows(states, at)
    found.whole = states, at
    return found


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


@contextmanager
def shared_image_kv() -> Iterator[None]:
    """Every row of queries has the memory's states copied for it, and projects keys and values of its own."""
    run = Stack.forward

    def forward(
        self: Stack,
        hidden: Tensor,
        mask: Tensor | None,
        memory: Memory | None = None,
        keep: Attentions | None = None,
        reads: list[Read] | None = None,
        layers: slice = slice(None),
    ) -> Any:
        if memory is not None:
            memory = _per_query(memory, len(hidden))
            reads = [replace(r, memory=r.rows, index=None) for r in reads] if reads is not None else None
        return run(self, hidden, mask, memory, keep, reads, layers)

    with _patched((Stack, "forward", forward)):
        yield


def _per_query(memory: Memory, n: int) -> Memory:
    """The memory with one row for each of n rows of queries."""
    own = n - (len(memory.index) if memory.index is not None else 0)
    index = torch.arange(own, device=memory.states.device) % len(memory.states)
    if memory.index is not None:
        index = torch.cat([index, memory.index])
    mask = memory.mask[index] if memory.mask is not None else None
    return Memory(memory.states[index], mask)


@contextmanager
def one_call() -> Iterator[None]:
    """Clean and masked images, and every group of text queries over images, in calls of their own.

    Groups over the same images go on sharing their keys and values, which is another saving.
    """
    fuse = TextModel.fuse

    def vision(tower: nn.Module, batch: Batch, *, clean: bool, masked: bool) -> tuple[Tensor | None, Tensor | None]:
        rows = len(batch.patch_mask)
        return (
            tower(batch.image) if clean else None,
            tower(batch.image[:rows], batch.patch_mask) if masked else None,
        )

    def group_by_group(
        self: TextModel,
        states: Tensor,
        mask: Tensor,
        memory: Memory,
        reads: list[Read],
        keep: Attentions | None = None,
    ) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in reads]
        with _shared_projections(memory.states):
            for rows, part in _groups(len(states), memory, reads, keep):
                inner = [_within(r, rows, part) for r in reads]
                kept = Attentions(slice(None)) if keep is not None and keep.cls_rows == rows else None
                parts = fuse(self, states[rows], mask[rows], part, [r for r in inner if r is not None], kept)
                for i in (i for i, r in enumerate(inner) if r is not None):
                    found[i].append(parts.pop(0))
                if kept is not None:
                    keep.cls = kept.cls
        return [torch.cat(parts) for parts in found]

    with _patched((forward, "_vision", vision), (TextModel, "fuse", group_by_group)):
        yield


def _groups(n: int, memory: Memory, reads: list[Read], keep: Attentions | None) -> Iterator[tuple[slice, Memory]]:
    """Groups of B of n rows of queries, each with its part of the memory; B is the smallest number anyone reads."""
    chosen = len(memory.index) if memory.index is not None else 0
    sizes = [len(memory.states), *(len(range(n)[r.rows]) for r in reads)]
    if keep is not None and keep.cls_rows is not None:
        sizes.append(len(range(n)[keep.cls_rows]))
    B, R = min(sizes), len(memory.states)
    for start in range(0, n, B):
        if start >= n - chosen:
            first = start - (n - chosen)
            yield slice(start, start + B), replace(memory, index=memory.index[first : first + B])
        else:
            rows = slice(start % R, start % R + B)
            mask = memory.mask[rows] if memory.mask is not None else None
            yield slice(start, start + B), Memory(memory.states[rows], mask)


def _within(read: Read, rows: slice, memory: Memory) -> Read | None:
    """The part of a read that falls on these rows."""
    if not read.rows.start <= rows.start < read.rows.stop:
        return None
    first = rows.start - read.rows.start
    return Read(slice(None), read.at[first : first + rows.stop - rows.start], index=memory.index)


@contextmanager
def _shared_projections(states: Tensor) -> Iterator[None]:
    """Attention projects rows of these states once, whoever asks."""
    project, storage = Attention.project, states.untyped_storage()._cdata
    seen: dict[tuple, tuple[Tensor, Tensor]] = {}

    def once(self: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.untyped_storage()._cdata != storage:
            return project(self, x)
        key = id(self), x.storage_offset(), x.shape
        if key not in seen:
            seen[key] = project(self, x)
        return seen[key]

    with _patched((Attention, "project", once)):
        yield


@contextmanager
def one_lookup() -> Iterator[None]:
    """Every pass looks its words up itself, each time with a gradient of the vocabulary's size."""
    language, finish = forward._language, Embeddings.finish

    def ids_only(text: TextModel, batch: Batch, *, cls: bool, clean: bool = False, masked: bool = False) -> Any:
        if text.split:
            return language(text, batch, cls=cls, clean=clean, masked=masked)
        starts = language(text, batch, cls=cls)
        return replace(starts, clean=batch.token_ids if clean else None, masked=batch.masked_ids if masked else None)

    def looked_up(self: Embeddings, x: Tensor) -> Tensor:
        return finish(self, x if x.is_floating_point() else self.word_embeddings(x))

    with _patched((forward, "_language", ids_only), (Embeddings, "finish", looked_up)):
        yield


@contextmanager
def sdpa() -> Iterator[None]:
    """Attention written out: scores, softmax, dropout, product."""

    def written(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
    ) -> Tensor:
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        return F.dropout(scores.softmax(-1), dropout_p) @ value

    with _patched((F, "scaled_dot_product_attention", written)):
        yield


@contextmanager
def bucketed_lengths() -> Iterator[None]:
    """Captions padded to ``text.max_tokens``, however short those of a micro-batch are."""
    whole = Losses.forward

    def padded(self: Losses, batch: Batch, *arguments: Any) -> Any:
        missing = self.run.text.max_tokens - batch.token_ids.shape[1]
        names = ("token_ids", "token_mask", "masked_ids", "word_start", "keyword_ok", "keyword_prior")
        return whole(self, replace(batch, **{n: F.pad(getattr(batch, n), (0, missing)) for n in names}), *arguments)

    with _patched((Losses, "forward", padded)):
        yield


@contextmanager
def cheap_masks() -> Iterator[None]:
    """On a CPU, dropout as torch has it."""

    def never(x: Tensor) -> bool:
        return False

    with _patched((stack, "cheap_on", never), (dropout, "cheap_on", never)):
        yield


@contextmanager
def teacher_dropout() -> Iterator[None]:
    """The teacher's passes have dropout, as with ``teacher.mode: train``. Alone of these it moves the soft targets."""
    whole = Losses.forward

    def dropping(self: Losses, *arguments: Any) -> Any:
        self.model.teacher.towers.train(self.training)
        try:
            return whole(self, *arguments)
        finally:
            self.model.teacher.train(self.training)

    with _patched((Losses, "forward", dropping)):
        yield


# --- beside the passes ------------------------------------------------------------------------------------------------


@contextmanager
def foreach_ema() -> Iterator[None]:
    """The teacher moves parameter by parameter, into new tensors."""

    @torch.no_grad()
    def update(self: Teacher, student: nn.Module) -> None:
        for own, other in zip(self.master.parameters(), student.parameters(), strict=True):
            own.data = own.data * self.m + other.data * (1 - self.m)
        self.refresh()

    with _patched((Teacher, "update", update)):
        yield


@contextmanager
def queue_in_place() -> Iterator[None]:
    """Both queues are copied, and copied again into one matrix with the keys of the micro-batch; queries of student and
    teacher read them one after the other.
    """

    def similarities(query: Tensor, key: Tensor, queue: Tensor | None, temperature: Tensor) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            every = key if queue is None else torch.cat([key, queue.clone().to(key.dtype)])
            return torch.cat([part @ every.T for part in query.split(len(key))]) / temperature

    with _patched((contrastive, "similarities", similarities)):
        yield


@contextmanager
def fused_adamw() -> Iterator[None]:
    """AdamW as torch makes it by default, after clipping; the host looks whether the gradient is finite."""

    def update(self: Step) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if norm.isfinite():
            if self.run.optim.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.run.optim.clip, norm)
            with _default_adamw(self.optimizer):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    with _patched((Step, "_update", update)):
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """The host waits for the device: for every drawn negative, and for the norm of every gradient."""
    draw = forward.negative_indices

    def one_by_one(similarity: Tensor, forbidden: Tensor, how: Negatives, eps: float) -> Tensor:
        if similarity.is_meta:
            return draw(similarity, forbidden, how, eps)
        own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        forbidden = torch.where(forbidden.all(1, keepdim=True), own, forbidden)
        drawn = losses.draw_negatives(similarity, forbidden, Itm(negatives=how), eps)
        return torch.tensor(drawn, device=similarity.device)

    def total_norm(gradients: list[Tensor], *_: Any, **__: Any) -> Tensor:
        norm = math.sqrt(sum(g.norm().item() ** 2 for g in gradients))
        return torch.tensor(norm, dtype=gradients[0].dtype, device=gradients[0].device)

    with _patched((forward, "negative_indices", one_by_one), (torch.nn.utils, "get_total_norm", total_norm)):
        yield


@contextmanager
def low_copy() -> Iterator[None]:
    """The teacher's passes run on its float32 master, which autocast casts in every pass."""
    with _patched((Teacher, "towers", property(lambda self: self.master)), (Teacher, "refresh", lambda self: None)):
        yield


@contextmanager
def _default_adamw(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The optimiser as made without ``fused``: its counters of steps are on the host."""
    states = [s for s in optimizer.state.values() if "step" in s]
    counters = [s["step"] for s in states]
    for state, count in zip(states, torch.stack(counters).tolist() if counters else [], strict=True):
        state["step"] = torch.tensor(count)
    for group in optimizer.param_groups:
        group["fused"] = None
    optimizer.found_inf = optimizer.grad_scale = None
    yield
    for group in optimizer.param_groups:
        group["fused"] = True
    for state, counter in zip(states, counters, strict=True):
        state["step"] = counter
    if counters:
        torch._foreach_add_(counters, 1)


@contextmanager
def _patched(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """(owner, name, value) in place of what is there."""
    with ExitStack() as patches:
        for owner, name, value in attributes:
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


SAVINGS = (
    Saving("last layers only where read", last_layer_rows, counts=True),
    Saving("image keys and values shared", shared_image_kv, counts=True),
    Saving("passes in one call", one_call),
    Saving("words looked up once", one_lookup),
    Saving("fused attention", sdpa),
    Saving("padding to the longest caption", bucketed_lengths, counts=True),
    Saving("cheap dropout masks", cheap_masks, device="cpu"),
    Saving("a teacher free of dropout", teacher_dropout),
    Saving("EMA in place", foreach_ema),
    Saving("queue in place, read once", queue_in_place),
    Saving("clipping and AdamW fused", fused_adamw),
    Saving("a host that never waits", no_waiting, device="cuda"),
    Saving("low-precision teacher copy", low_copy, device="cuda"),
)

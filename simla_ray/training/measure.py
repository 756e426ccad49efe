"""Instruments for the cost of a step: noise to run it on, seconds, floating-point operations, matmul share, memory.

Seconds are CPU seconds of the process (all its threads), or GPU seconds between two events on the stream. Tasks are
timed in turn, round after round, so that a machine that slows down slows all of them; ratios are taken within rounds.

FLOPs are counted on the meta device, from shapes alone: products and convolutions, two for a multiplication with its
addition, forward and backward. Attention is counted as the products it is made of, whatever kernel would run it.

Peak memory is that of tensors: what is held between steps, plus the highest that one step's allocations reach on top of
it. It leaves out the interpreter, torch itself, the scratch space of its libraries and what the allocator wastes: a
process that trains ViT-S/16 with batch 4 on a CPU was 0.8 GiB larger than its 2.45 GiB of tensors.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from simla_ray.config.schema import RegionSource, Run
from simla_ray.data.collate import collate
from simla_ray.data.masking import mask_patches, mask_words
from simla_ray.data.regions import grid_boxes
from simla_ray.data.sample import stacked
from simla_ray.errors import UserError
from simla_ray.types import Batch

#: Ids of the noise: padding is 0 everywhere, words follow.
CLS_ID, MASK_ID, FIRST_WORD = 1, 2, 3

#: Dense peak by a part of the GPU's name, FLOP/s: bfloat16 with float32 sums, and float32 without TF32 (data sheets).
PEAKS = {
    "GB200": (2500e12, 80e12),
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
}

#: Operators that are products, next to those with "conv" or "attention" in their names.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl::_mkl_linear", "mkldnn::_linear_pointwise"}
MARK = "measured step"
WIDTH = 118


# --- noise ------------------------------------------------------------------------------------------------------------


def synthetic_batch(run: Run, vocab_size: int, lengths: Sequence[int] | None = None, seed: int = 0) -> Batch:
    """A micro-batch of noise with real masks, put together as samples of a data set are.

    Args:
        lengths: tokens of the ``batch.micro`` captions, [CLS] included; None: all of ``text.max_tokens``.
    """
    rng = np.random.default_rng(seed)
    lengths = [run.text.max_tokens] * run.batch.micro if lengths is None else lengths
    batch = collate(stacked([_sample(run, vocab_size, n, i, rng) for i, n in enumerate(lengths)]), run)
    if "mim" in run.objectives.active():
        codes = rng.integers(0, run.codes.n, batch.patch_mask.shape)
        batch.codes = torch.from_numpy(codes)
    return batch


def _sample(run: Run, vocab_size: int, n: int, row: int, rng: np.random.Generator) -> dict[str, Any]:
    length, position = run.text.max_tokens, np.arange(run.text.max_tokens)
    ids = np.where(position < n, rng.integers(FIRST_WORD, vocab_size, length), 0)
    ids[0] = CLS_ID
    words = (position > 0) & (position < n)
    mlm, mim = run.objectives.mlm, run.objectives.mim
    masked = mask_words(ids, words, mlm.p if mlm is not None else 0.0, MASK_ID, vocab_size, rng)
    sample = {
        "image": rng.integers(0, 256, (3, run.vision.image_px, run.vision.image_px), dtype=np.uint8),
        "image_id": np.int64(row),
        "n_tokens": np.int64(n),
        "token_ids": ids,
        "word_start": position,
        "masked_ids": masked.ids,
        "mlm_chosen": masked.chosen,
        "keyword_ok": words,
    }
    if mim is not None:
        sample["patch_mask"] = mask_patches(run.grid, int(mim.mask_ratio * run.grid**2), rng)
    if run.regions is not None:
        sample |= _regions(run, rng)
    if run.text.concepts:
        sample |= _with_concepts(run, sample, vocab_size, rng)
    if run.tags is not None:
        n_tags = run.tags.max_tokens
        chosen = (np.arange(n_tags) > 0) & (rng.random(n_tags) < (run.objectives.mcr.p if run.objectives.mcr else 0))
        tags = np.append(CLS_ID, rng.integers(FIRST_WORD, vocab_size, n_tags - 1))
        sample |= {"tag_ids": tags, "masked_tag_ids": tags, "mcr_chosen": chosen, "n_tags": np.int64(n_tags)}
    answers, labels = run.objectives.answers, run.objectives.labels
    if labels is not None:
        sample["label"] = rng.integers(len(labels.classes))
        if labels.pictures == 2:
            sample["second_image"] = sample["image"][:, ::-1]
    if answers is not None:
        sample["label"] = rng.integers(answers.most)
        sample["answer_ids"] = np.array([CLS_ID, *rng.integers(FIRST_WORD, vocab_size, answers.max_tokens)])
    return sample


def _with_concepts(run: Run, sample: dict[str, Any], vocab_size: int, rng: np.random.Generator) -> dict[str, Any]:
    """The arrays of a text with as many concepts behind it as fit, and one token for [SEP]."""
    n, length = int(sample["n_tokens"]), run.text.length
    here = np.arange(length)
    is_concept = (here >= n) & (here < length - 1)
    ids = np.where(is_concept, vocab_size + rng.integers(0, run.concepts.most, length), CLS_ID)
    longer: dict[str, Any] = {"n_tokens": np.int64(length), "is_concept": is_concept}
    for name in ("token_ids", "masked_ids", "word_start", "mlm_chosen", "keyword_ok"):
        longer[name] = np.where(here < n, np.resize(sample[name], length), ids if name.endswith("_ids") else 0)
    return longer | {name: longer[name].astype(bool) for name in ("mlm_chosen", "keyword_ok")}


def _regions(run: Run, rng: np.random.Generator) -> dict[str, Any]:
    """As many regions as the grid has cells, or ``regions.max`` of them, with their features where these are given."""
    assert run.regions is not None
    source, most = run.regions.source, run.regions.max
    if source is RegionSource.column or source is RegionSource.boxes:
        corners = np.sort(rng.random((most, 2, 2), dtype=np.float32), axis=1)
        regions: dict[str, Any] = {"region_boxes": corners.reshape(most, 4)}
        if source is RegionSource.column:
            regions["regions"] = rng.random((most, run.regions.width or 1), dtype=np.float32)
    else:
        regions = {"region_boxes": grid_boxes(run.regions.grid)}
    n = len(regions["region_boxes"])
    if run.regions.classes is not None:
        regions["region_class"] = rng.integers(0, 1 + len(run.regions.classes), n)
    return regions | {"n_regions": np.int64(n), "region_hidden": rng.random(n) < run.regions.mask_p}


# --- seconds ----------------------------------------------------------------------------------------------------------


def seconds(task: Callable[[], object], device: torch.device) -> float:
    """Seconds that a task takes: of the CPU, all threads together, or of the GPU."""
    if device.type != "cuda":
        began = time.process_time()
        task()
        return time.process_time() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    task()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every task in ``rounds`` rounds of one after the other, after some that warm up.

    Raises:
        UserError: a task does not fit the GPU's memory.
    """
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(1 - warm_up, rounds + 1):
        for name, task in tasks.items():
            try:
                found[name].append(seconds(task, device))
            except torch.OutOfMemoryError:
                raise UserError(f"--batch: {name} does not fit the GPU's memory; use a smaller batch") from None
        each = ", ".join(f"{name} {times[-1]:.3g} s" for name, times in found.items())
        line = f"round      {number} of {rounds}: {each}" if number > 0 else f"warm up    {each}"
        say(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ...")
    return {name: times[warm_up:] for name, times in found.items()}


@dataclass(frozen=True)
class Spread:
    """Median of rounds, and their smallest and largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratio(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Of the ratios within rounds."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


# --- floating-point operations ----------------------------------------------------------------------------------------


def flops(total: Callable[[], Tensor]) -> int:
    """FLOPs of a forward that gives a scalar on the meta device, and of its backward."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _AllTogether()  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH), autocast_on_meta(), counter:
        total().backward()
    return counter.get_total_flops()


class _AllTogether(nullcontext[None]):
    """In place of torch's account by module, which fails where one is called without gradients on a view."""

    parents = frozenset({"Global"})


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """torch knows no autocast for the meta device, not even to switch it off; it counts the same in any format."""
    real = torch.autocast

    class Autocast(real):  # type: ignore[valid-type, misc]
        def __init__(self, device_type: str, *args: Any, **options: Any):
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **options)

    torch.autocast = Autocast  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a GPU in FLOP/s; None where it is not known, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, (bf16, fp32) in PEAKS.items():
        if part in name:
            return bf16 if dtype == torch.bfloat16 else fp32
    return None


# --- matmul share and memory ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inside:
    """What a profiled step showed: share of its time in products, and bytes at its peak above those at its start."""

    matmul_share: float
    peak_bytes: int


def look_inside(task: Callable[[], object], device: torch.device) -> Inside:
    """Profile a task, which runs twice: what it frees of an earlier run can only be told when that was profiled too.

    The share is of self time: of the CPU's between the task's begin and end, or of all kernels on the GPU.
    """
    if device.type == "cuda":
        return _look_inside_gpu(task, device)
    with _no_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(2):
            with record_function(MARK):
                task()
    events, mark = _second_run(recorded)
    return Inside(_share_on_cpu(events, mark), _peak_on_cpu(events))


def _look_inside_gpu(task: Callable[[], object], device: torch.device) -> Inside:
    """Once for the memory, which the GPU's allocator knows, once for the kernels."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    task()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - held
    with _no_chatter(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        task()
        torch.cuda.synchronize(device)
    return Inside(_share_on_gpu(recorded), peak)


@contextmanager
def _no_chatter() -> Iterator[None]:
    """The profiler writes its own lines to the process's stderr, below Python's."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def is_product(name: str) -> bool:
    """Whether an operator of this name is a matrix product, a convolution or attention."""
    return name in PRODUCTS or (name.startswith("aten::") and ("conv" in name or "attention" in name))


def _second_run(recorded: profile) -> tuple[list[Any], Any]:
    """Events of the second run in the order of their beginning, outer ones first, and the mark around them."""
    events = list(recorded.profiler.kineto_results.events())  # type: ignore[union-attr]
    _, mark = sorted((e for e in events if e.name() == MARK), key=lambda e: e.start_ns())
    within = [e for e in events if mark.start_ns() <= e.start_ns() and e.end_ns() <= mark.end_ns()]
    return sorted(within, key=lambda e: (e.start_ns(), -e.end_ns())), mark


def _share_on_cpu(events: list[Any], mark: Any) -> float:
    """Share of the mark's time in products themselves, without what they call; all on one thread, as on a CPU."""
    products, open_ = 0, []  # events that have begun, innermost last, each with the time left for itself
    for event in [*events, None]:
        while open_ and (event is None or open_[-1][0].end_ns() <= event.start_ns()):
            done, own = open_.pop()
            products += own if is_product(done.name()) else 0
        if event is not None and event.duration_ns() and event.start_thread_id() == mark.start_thread_id():
            if open_:
                open_[-1][1] -= event.duration_ns()
            open_.append([event, event.duration_ns()])
    return products / mark.duration_ns()


def _share_on_gpu(recorded: profile) -> float:
    """Kernels are listed for themselves, and once more under the operators that launched them."""
    events = recorded.key_averages()
    kernels = sum(
        e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    )
    products = sum(e.self_device_time_total for e in events if e.device_type == DeviceType.CPU and is_product(e.key))
    return products / kernels


def _peak_on_cpu(events: list[Any]) -> int:
    """Highest sum of what was allocated and freed."""
    return int(np.cumsum([0] + [e.nbytes() for e in events if e.name() == "[memory]"]).max())


def held_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and the optimiser's moments; storage that several share counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

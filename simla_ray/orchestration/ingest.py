"""How fast samples come: our stream against a torch DataLoader and a plain loop that make the same samples.

All of them do the same work on the same JPEGs with as many processes: decode, crop, flip, RandAugment, tokenise, mask.
The DataLoader reads single files and collates in its workers, with and without decoding JPEGs at reduced scale; the
plain loop hands its samples to nobody, so it is what the processors give at best.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from simla_ray.config.load import load_run
from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.collate import collate
from simla_ray.data.cursor import Cursor
from simla_ray.data.index import Index, build_index
from simla_ray.data.order import Position
from simla_ray.data.packing import pack
from simla_ray.data.prefetch import Prefetched
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.data.text import Vocabulary, build_vocabulary
from simla_ray.errors import UserError
from simla_ray.orchestration.worker import PREFETCHED

#: Side of the JPEGs in pixels -> how many of them an epoch has.
ROWS = {256: 20_000, 1024: 5_000}
#: The tower's side, pixels; the size of the published model.
TOWER_PX = 256
MICRO = 64
#: Pictures that differ; the others repeat their bytes.
DISTINCT = 64
ROW_GROUP_BYTES = 2**23
OURS, TWIN, TWIN_DRAFT, PLAIN = "simla_ray", "DataLoader", "DataLoader, reduced decoding", "plain loop"
#: Seconds after the first batch before our stream is timed: Ray starts actors of its own meanwhile.
LEAD_S = 6.0
#: The stream is planned for so many, and closed when enough was taken.
MOST_STEPS = 10_000
#: Parts of an epoch that take turns.
PARTS = 5
#: Parts of an epoch at which memory is looked at.
LOOKS = 10
WORDS = ("a", "two", "red", "small", "dog", "cat", "bicycle", "stands", "jumps", "over", "beside", "water", "street")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        px: sides of the JPEGs.
        rows: JPEGs of an epoch; None: ``ROWS``.
        tasks: processes that make samples.

    Raises:
        UserError: a value that cannot be; names the option.
    """

    px: tuple[int, ...] = tuple(ROWS)
    rows: int | None = None
    tasks: int = 2

    def __post_init__(self) -> None:
        for side in self.px:
            if side not in ROWS:
                raise UserError(f"--px: {side} is not one of {', '.join(map(str, ROWS))}")
        for name, least, most in (("rows", 8 * PARTS * MICRO, 10**7), ("tasks", 1, 1024)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(f"--{name}: {value} is not in {least}..{most}")


def measure_ingest(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what the plan asks for, and say how it goes.

    Returns:
        what ``--json`` prints: by the side of the JPEGs the figures of every contender and ``ratio_to_dataloader``
        (pairs/s of ours over the DataLoader's without reduced decoding), ``ratio_to_dataloader_reduced``,
        ``ratio_to_pillow`` and ``first_batch_s``; ``scaling`` over decode CPUs and ``memory`` over an epoch, of the
        first size.
    """
    pipeline.connect(None, plan.tasks + 2)
    pipeline.quiet()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="simla-ray-") as folder:
        for side in plan.px:
            workshop = _Workshop.build(Path(folder) / str(side), side, plan.rows or ROWS[side], plan.tasks, say)
            result[str(side)] = _measure(workshop, say)
            if side == plan.px[0]:
                result["scaling"] = _scaling(workshop, say)
                result["memory"] = _memory_of(workshop, say)
    return result


@dataclass
class _Workshop:
    """Data of one size and the contenders over it; each makes an epoch and says what it saw."""

    run: Run
    index: Index
    vocabulary: Vocabulary
    files: list[dict[str, Any]]
    side: int
    rows: int
    tasks: int

    @classmethod
    def build(cls, folder: Path, side: int, rows: int, tasks: int, say: Callable[[str], None]) -> _Workshop:
        say(f"write      {rows} JPEGs of {side} px")
        folder.mkdir()
        rng = np.random.default_rng(side)
        jpegs = [_jpeg(rng, side) for _ in range(DISTINCT)]
        for i, jpeg in enumerate(jpegs):
            (folder / f"{i}.jpg").write_bytes(jpeg)
        captions = [" ".join(rng.choice(WORDS, int(rng.integers(6, 14)))) for _ in range(rows)]
        group = max(1, ROW_GROUP_BYTES // len(jpegs[0]))
        schema = pa.schema({"uid": pa.string(), "image": pa.binary(), "caption": pa.string()})
        with pq.ParquetWriter(folder / "train.parquet", schema, compression="none") as writer:
            for start in range(0, rows, group):
                numbers = range(start, min(start + group, rows))
                images = [jpegs[i % DISTINCT] for i in numbers]
                writer.write_table(
                    pa.table([[f"{i:08d}" for i in numbers], images, captions[start : numbers.stop]], schema=schema)
                )
        run = load_run(
            overrides={
                "size": "base", "text.vocab": "train", "vision.pretrained": False, "text.weights": None,
                "codes.kind": "kmeans", "codes.source": None, "codes.n": 256, "vision.image_px": TOWER_PX,
                "batch.micro": MICRO, "batch.global": 2 * MICRO, "queue": 0, "data.decode_cpus": tasks,
                "ray.workers": 1,
                "data.train": [str(folder / "train.parquet")], "data.val": [str(folder / "train.parquet")],
            }
        )  # fmt: skip
        index = build_index(run.data.train, None, [], "data.train")
        files = [
            {"uid": f"{i:08d}", "image_id": f"{i:08d}", "image": folder / f"{i % DISTINCT}.jpg", "captions": [caption]}
            for i, caption in enumerate(captions)
        ]
        return cls(run, index, build_vocabulary(captions, run.text), files, side, rows, tasks)

    def ours(self, part: range, tasks: int | None = None, look: bool = False) -> _Part:
        """Our stream as a worker takes it, from when it is under way: a run starts it once."""
        run, lanes = self.run, list(range(self.run.micro_batches))
        batches = len(part) // MICRO
        start = Cursor((Position(0, part.start // len(lanes)),) * len(lanes))
        began = time.perf_counter()
        dataset = pipeline.training_stream(
            run, self.index, self.vocabulary, lanes, start, MOST_STEPS, tasks or self.tasks
        )
        stream = Prefetched(pack(pipeline.blocks_of(dataset), lanes, run, self.rows), PREFETCHED)
        next(stream)
        found = _Part(first_batch_s=time.perf_counter() - began)
        began = time.perf_counter()
        while time.perf_counter() - began < LEAD_S:
            next(stream)
        began = time.perf_counter()
        for number in range(batches):
            next(stream)
            found.pairs += MICRO
            if look and (number + 1) * LOOKS % batches < LOOKS:
                found.memory.append(_memory())
        found.seconds = time.perf_counter() - began
        stream.close()
        return found

    def loader(self, reduced: bool) -> Callable[[range], _Part]:
        """A torch DataLoader, its workers kept over parts."""
        data = _Files(self.files, self.run, self.vocabulary, SampleMaker if reduced else _FullScale)
        order = _Order()
        loader = DataLoader(
            data, MICRO, sampler=order, num_workers=self.tasks, persistent_workers=True, drop_last=True,
            collate_fn=data.collate,
        )  # fmt: skip

        def part_of(part: range) -> _Part:
            order.rows = np.random.default_rng(part.start).permutation(part).tolist()
            began, found = time.perf_counter(), _Part()
            for batch in loader:
                found.pairs += len(batch.image)
            found.seconds = time.perf_counter() - began
            return found

        return part_of

    def plain(self, part: range) -> _Part:
        """Loops in processes of their own."""
        began = time.perf_counter()
        context = multiprocessing.get_context("fork")
        loops = [
            context.Process(
                target=_loop, args=(self.files[part.start + n : part.stop : self.tasks], self.run, self.vocabulary)
            )
            for n in range(self.tasks)
        ]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join()
        return _Part(len(part), time.perf_counter() - began)


@dataclass
class _Part:
    """What a contender has made of a part of the epoch."""

    pairs: int = 0
    seconds: float = 0.0
    first_batch_s: float = 0.0
    memory: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.pairs / self.seconds


class _FullScale(SampleMaker):
    """Decodes every pixel."""

    @staticmethod
    def reduction(wanted: object) -> int:
        return 1


class _Order(Sampler):
    """Rows in an order that can be changed while workers are kept."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


class _Files(Dataset):
    def __init__(self, rows: list[dict[str, Any]], run: Run, vocabulary: Vocabulary, maker: type[SampleMaker]):
        self.rows, self.run, self.make = rows, run, maker(run, vocabulary, training=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[str, dict[str, np.ndarray]]:
        return self.rows[i]["uid"], self.make(self.rows[i], 0)

    def collate(self, samples: list[tuple[str, dict[str, np.ndarray]]]) -> Any:
        return collate(
            stacked([sample for _, sample in samples]), self.run, [uid for uid, _ in samples], [0] * len(samples)
        )


def _loop(rows: list[dict[str, Any]], run: Run, vocabulary: Vocabulary) -> None:
    torch.set_num_threads(1)
    make = SampleMaker(run, vocabulary, training=True)
    for row in rows:
        make(row, 0)


def _measure(workshop: _Workshop, say: Callable[[str], None]) -> dict[str, Any]:
    """An epoch of every contender, in parts that take turns: a machine that is slow for a while is so for all."""
    contenders: dict[str, Callable[[range], _Part]] = {
        OURS: workshop.ours,
        TWIN: workshop.loader(reduced=False),
        TWIN_DRAFT: workshop.loader(reduced=True),
        PLAIN: workshop.plain,
    }
    parts: dict[str, list[_Part]] = {name: [] for name in contenders}
    for part_of in contenders.values():
        part_of(range(8 * MICRO))  # warms up
    size = -(-workshop.rows // PARTS)
    for number, start in enumerate(range(0, workshop.rows, size)):
        part = range(start, min(start + size, workshop.rows))
        for name, part_of in list(contenders.items())[:: 1 if number % 2 == 0 else -1]:
            parts[name].append(part_of(part))
        rates = ", ".join(f"{name} {of[-1].rate:,.0f}" for name, of in parts.items())
        say(f"{workshop.side:>5} px   part {number + 1} of {PARTS}, pairs/s: {rates}")
    whole = {name: _Part(sum(p.pairs for p in of), sum(p.seconds for p in of)) for name, of in parts.items()}

    def against(other: str) -> tuple[float, list[float]]:
        each = [a.rate / b.rate for a, b in zip(parts[OURS], parts[other], strict=True)]
        return whole[OURS].rate / whole[other].rate, [min(each), max(each)]

    found: dict[str, Any] = {"rows": workshop.rows, "tasks": workshop.tasks, "parts": len(parts[OURS])}
    for key, other in (("dataloader", TWIN), ("dataloader_reduced", TWIN_DRAFT), ("pillow", PLAIN)):
        found[f"ratio_to_{key}"], found[f"ratio_to_{key}_range"] = against(other)
    found["first_batch_s"] = max(part.first_batch_s for part in parts[OURS])
    found["pairs_per_s"] = {name: of.rate for name, of in whole.items()}
    return found


def _memory_of(workshop: _Workshop, say: Callable[[str], None]) -> dict[str, Any]:
    """A whole epoch of ours without a break, memory looked at after every tenth of it."""
    memory = workshop.ours(range(workshop.rows), look=True).memory
    growth = max(memory[1:]) / memory[0] - 1
    say(f"{workshop.side:>5} px   memory over {workshop.rows} JPEGs: {growth:+.1%}")
    return {"rows": workshop.rows, "bytes": memory, "growth": growth}


def _scaling(workshop: _Workshop, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Our stream with 1, 2, 4, ... tasks, up to as many as there are cores."""
    found = []
    for tasks in _doubled(os.cpu_count() or 1):
        rate = workshop.ours(range(min(workshop.rows, 4096)), tasks).rate
        say(f"{workshop.side:>5} px   {tasks} decode CPUs: {rate:,.0f} pairs/s")
        found.append({"decode_cpus": tasks, "pairs_per_s": rate})
    return found


def _doubled(most: int) -> Iterator[int]:
    n = 1
    while n < most:
        yield n
        n *= 2
    yield most


def _memory() -> int:
    """Bytes that this process, those it has started and shared memory hold together, each page counted once (Linux)."""
    kilobytes = sum(_entry(f"/proc/{pid}/smaps_rollup", "Private_") for pid in _with_children(os.getpid()))
    return 1024 * (kilobytes + _entry("/proc/meminfo", "Shmem:"))


def _with_children(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in children:
            yield from _with_children(int(child))


def _entry(path: str, name: str) -> int:
    """The sum of the lines that begin so, kB; 0 where the process has just ended."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(name))


def _jpeg(rng: np.random.Generator, side: int) -> bytes:
    """A picture with detail at every scale, as photographs have it."""
    image = np.zeros((side, side, 3), dtype=np.float32)
    cells = 4
    while cells <= side:
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (
            np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) - 128
        ) / cells**0.6
        cells *= 2
    image = (image - image.min()) / np.ptp(image) * 255
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

"""The one place that builds Ray datasets: the training stream, and the jobs that prepare vocabulary and codes.

The training stream reads windows of the order (``order.py``), one task a window, and yields finished samples in that
order. Each worker has a stream over its own lanes, so no split can drop or reorder rows.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from simla_ray.config.schema import Run
from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.codes import Featurise, pixel_patches
from simla_ray.data.cursor import Cursor
from simla_ray.data.decode import DropRow, decode
from simla_ray.data.index import Index
from simla_ray.data.order import Order, Share, Window
from simla_ray.data.sample import SampleMaker
from simla_ray.data.schema import TRAINING
from simla_ray.data.sources import read_rows
from simla_ray.data.text import Vocabulary, clean

#: Samples per block: small, so that the first batch does not wait for a whole window.
BLOCK_ROWS = 256
MAX_BLOCKS = 2000
PAUSE_S = 0.02

#: Map function: columns of a batch in, blocks of columns out.
Work = Callable[[dict[str, np.ndarray]], Iterator[dict[str, np.ndarray]]]


class Pause(ExecutionCallback):
    """A short pause after every round of Ray Data's scheduler.

    While its output waits to be taken, the scheduler asks again at once and for ever (seen in Ray 2.60). On a small
    machine that took 0.4 of a core per worker from the training.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(PAUSE_S)


def connect(address: str | None, cpus: float) -> str | None:
    """Join the Ray cluster at an address, or start a Ray of this process, which listens on loopback.

    Args:
        cpus: logical CPUs that a Ray of our own must have; on a small machine they share the real ones.

    Returns:
        Where its dashboard is, if it has one.

    Raises:
        ConnectionError, ValueError, RuntimeError: no cluster at the address.
    """
    for name in ("ray", "ray.data", "ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return None
    own = {"num_cpus": max(int(cpus + 0.999), os.cpu_count() or 1), "_node_ip_address": "127.0.0.1"}
    return ray.init(
        address=address or "local",
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({} if address else own),
    ).dashboard_url


def quiet() -> None:
    """Switch Ray Data's progress bars and log lines off in this process, and let its scheduler pause."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The second reader is several times slower on small machines (measured: 0.2x).
    context.use_datasource_v2 = False
    if Pause not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pause)
    for name in ("ray.data", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)


def order_of(run: Run, index: Index) -> Order:
    """The training order of a run over an index."""
    shares, end = [], 0
    if run.data.weights is not None:
        for n, weight in zip(index.per_uri, run.data.weights, strict=True):
            shares.append(Share(end, end + n, weight))
            end += n
    rows = tuple(len(u) for u in index.units)
    return Order(rows, run.micro_batches, run.data.shuffle_window, run.seed, tuple(shares))


def worker_lanes(lanes: int, workers: int, rank: int) -> list[int]:
    """Lanes of a worker: rank, rank + workers, ..."""
    return list(range(rank, lanes, workers))


def training_stream(
    run: Run, index: Index, vocabulary: Vocabulary, lanes: Sequence[int], cursor: Cursor, steps: int, tasks: int
) -> ray.data.Dataset:
    """Samples of some lanes, in order, from the cursor on, enough for ``steps`` more steps.

    Columns: ``lane, epoch, offset, uid, drop`` and the arrays of ``SampleMaker``. A row that cannot be used has its
    reason in ``drop`` and zeros elsewhere, so that it is counted where its neighbours are trained on.

    Args:
        tasks: windows that are read at the same time.
    """
    order = order_of(run, index)
    # Rows may be dropped up to max_drop_fraction; one more window covers what rounding leaves.
    rows = steps * run.batch.micro / (1 - min(run.data.max_drop_fraction, 0.9)) + order.window
    plans = [_enough(order.windows(lane, cursor.positions[lane]), rows) for lane in lanes]
    windows = [w for group in _round_robin(plans) for w in group]
    dataset = ray.data.from_items(
        [{"lane": w.lane, "epoch": w.epoch, "start": w.start, "stop": w.stop} for w in windows],
        override_num_blocks=min(len(windows), MAX_BLOCKS),
    )
    read = WindowReader(run, index, order, vocabulary)
    dataset = dataset.map_batches(
        read, batch_size=1, batch_format="numpy", compute=ray.data.TaskPoolStrategy(size=tasks)
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.target_max_block_size = 2**23
    context.enable_progress_bars = False
    return dataset


class WindowReader:
    """Map function: windows in, blocks of samples out. One instance serves any number of windows."""

    def __init__(self, run: Run, index: Index, order: Order, vocabulary: Vocabulary):
        self.run, self.index, self.order, self.vocabulary = run, index, order, vocabulary
        self.make: SampleMaker | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        if self.make is None:
            self.make = SampleMaker(self.run, self.vocabulary, training=True)
        for lane, epoch, start, stop in zip(
            *(batch[c].tolist() for c in ("lane", "epoch", "start", "stop")), strict=True
        ):
            window = Window(lane, epoch, start, stop)
            times, ordinals = np.divmod(self.order.ordinals(window), len(self.index))
            rows: list[Any] = [None] * len(ordinals)
            for unit, places, where in self.index.locate(ordinals):
                for position, row in zip(where, read_rows(unit, places, TRAINING, self.index.roots), strict=True):
                    rows[position] = (row, int(times[position]))
            for i in range(0, len(rows), BLOCK_ROWS):
                yield self._block(window, i, rows[i : i + BLOCK_ROWS])

    def _block(self, window: Window, first: int, rows: list[tuple[dict[str, Any], int]]) -> dict[str, np.ndarray]:
        assert self.make is not None
        samples, reasons = [], []
        for row, times in rows:
            try:
                samples.append(self.make(row, window.epoch, times))
                reasons.append("")
            except DropRow as drop:
                samples.append(None)
                reasons.append(drop.reason)
        shape_of = next((s for s in samples if s is not None), None) or self._blank()
        filled = [s if s is not None else {n: np.zeros_like(v) for n, v in shape_of.items()} for s in samples]
        block = {name: np.stack([s[name] for s in filled]) for name in shape_of}
        n = len(rows)
        block["lane"], block["epoch"] = np.full(n, window.lane), np.full(n, window.epoch)
        block["offset"] = window.start + first + np.arange(n)
        block["uid"] = np.array([row["uid"] for row, _ in rows])
        block["drop"] = np.array(reasons)
        return block

    def _blank(self) -> dict[str, np.ndarray]:
        """A sample of the right shapes, for a block in which every row is dropped."""
        import io

        from PIL import Image

        assert self.make is not None
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        return self.make({"uid": "", "image_id": "", "image": buffer.getvalue(), "captions": ["a"]}, 0)


def job(items: Sequence[Mapping[str, Any]], work: Work, tasks: int) -> Iterator[dict[str, np.ndarray]]:
    """Run ``work`` over items, each a batch of one in a task of its own; its blocks as they come, in the items' order.

    Args:
        tasks: how many run at the same time.
    """
    dataset = ray.data.from_items(list(items), override_num_blocks=min(len(items), MAX_BLOCKS))
    dataset = dataset.map_batches(
        work, batch_size=1, batch_format="numpy", compute=ray.data.TaskPoolStrategy(size=tasks)
    )
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy")


def caption_stream(index: Index, max_words: int, cpus: int) -> Iterator[str]:
    """Every cleaned caption of an index, in file order: a Ray Data job that reads the caption columns only."""
    for block in job([{"unit": i} for i in range(len(index.units))], _Captions(index, max_words), cpus):
        yield from (str(c) for c in block["caption"])


class _Captions:
    def __init__(self, index: Index, max_words: int):
        self.index, self.max_words = index, max_words

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for number in batch["unit"].tolist():
            unit = self.index.units[number]
            # A JSON list keeps images as paths, so reading every column costs nothing there.
            rows = read_rows(unit, np.arange(len(unit)), ("captions",), self.index.roots)
            cleaned = [clean(str(c), self.max_words) for row in rows for c in row["captions"] if c]
            yield {"caption": np.array([c for c in cleaned if c] or [""])}


def patch_features(run: Run, index: Index, featurise: Featurise | None, cpus: int) -> np.ndarray:
    """(n, d) float32 features of the patches of ``codes.fit_images`` training images, by a Ray Data job.

    Args:
        featurise: patch features of a frozen tower; None takes pixels.
    """
    rng = np.random.default_rng([run.seed, 11])
    n = min(run.codes.fit_images, len(index))
    ordinals = np.sort(rng.choice(len(index), n, replace=False))
    chunks = [{"first": i, "last": min(i + 256, n)} for i in range(0, n, 256)]
    blocks = job(chunks, _Patches(run, index, ordinals, featurise), cpus)
    return np.concatenate([b["features"] for b in blocks if len(b["features"])])


class _Patches:
    def __init__(self, run: Run, index: Index, ordinals: np.ndarray, featurise: Featurise | None):
        self.run, self.index, self.ordinals, self.featurise = run, index, ordinals, featurise

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        px = self.run.vision.image_px
        for first, last in zip(batch["first"].tolist(), batch["last"].tolist(), strict=True):
            images = []
            for unit, places, _ in self.index.locate(self.ordinals[first:last]):
                for row in read_rows(unit, places, ("uid", "image"), self.index.roots):
                    try:
                        images.append(to_array(evaluation_view(decode(row["image"], self.run.data.max_pixels), px)))
                    except DropRow:
                        continue  # counted where it is trained on
            if not images:
                continue
            stacked = np.stack(images)
            featurise = self.featurise or (lambda x: pixel_patches(x, self.run.vision.patch_px))
            features = featurise(stacked)
            yield {"features": features.reshape(-1, features.shape[-1])}


def iterate_rows(index: Index, rank: int = 0, world: int = 1, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows rank, rank + world, ... of the first ``limit`` rows, every column, read in this process.

    Evaluation reads its rows so: nothing between the files and the metric can drop one.
    """
    ordinals = np.arange(rank, min(limit or len(index), len(index)), world)
    for unit, places, _ in index.locate(ordinals):
        for i in range(0, len(places), 256):
            yield from read_rows(unit, places[i : i + 256], None, index.roots)


def _enough(windows: Iterable[Window], rows: float) -> list[Window]:
    taken, total = [], 0
    for window in windows:
        taken.append(window)
        total += window.stop - window.start
        if total >= rows:
            break
    return taken


def _round_robin(plans: Sequence[Sequence[Window]]) -> Iterator[list[Window]]:
    for i in range(max(len(p) for p in plans)):
        yield [p[i] for p in plans if i < len(p)]

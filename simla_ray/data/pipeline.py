"""The one place that builds Ray datasets: the training stream, and the jobs that prepare vocabulary and codes.

The training stream reads windows of the order (``order.py``) and yields finished samples in that order. Each worker has
a stream over its own lanes, so no split can drop or reorder rows. What the tasks do is in ``map_functions.py``.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np
import ray
import ray.data
from ray._private import ray_constants
from ray.data._internal.execution.execution_callback import ExecutionCallback

from simla_ray.config.schema import Run
from simla_ray.data.blocks import Block, table_block
from simla_ray.data.codes import Featurise
from simla_ray.data.concept_tokens import concept_columns
from simla_ray.data.concepts import Concept
from simla_ray.data.cursor import Cursor
from simla_ray.data.index import Index, repeats
from simla_ray.data.map_functions import (
    BLOCK_ROWS,
    NONE,
    BlockMaker,
    CaptionReader,
    ConceptReader,
    PatchReader,
    WindowReader,
)
from simla_ray.data.order import Order, Share, Window
from simla_ray.data.questions import task_columns
from simla_ray.data.region_reader import RegionFeaturise, RegionReader
from simla_ray.data.regions import region_columns
from simla_ray.data.sample import code_image_px
from simla_ray.data.sources import read_pieces
from simla_ray.data.tags import tag_columns
from simla_ray.data.text import Vocabulary

#: Such blocks that one task makes: enough that a short wait for the next task does not count.
TASK_BLOCKS = 2
MAX_BLOCKS = 2000
#: What a worker's stream may keep in the object store: encoded rows at most, and blocks beside those that tasks make.
ENCODED_BYTES = 2**27
WAITING_BLOCKS = 2
#: Windows of encoded rows that it keeps, and how much smaller an encoded picture is than its pixels, about.
ENCODED_WINDOWS = 2
COMPRESSION = 8
#: One reading task feeds this many that make samples.
SAMPLERS_PER_READER = 4
#: Another number than the samplers' keeps Ray Data from fusing both stages into one task.
READER_CPUS = 0.1
#: Tasks with a model that share a GPU at most: each has a copy there.
TASKS_PER_GPU = 4
PAUSE_S = 0.05

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
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        return ray.init(address=address, **common).dashboard_url
    ray_constants.ENABLE_RAY_CLUSTER = False  # an address that is given to ray.init is replaced by the machine's
    with known_at("127.0.0.1"):
        return ray.init(num_cpus=max(int(cpus + 0.999), os.cpu_count() or 1), address="local", **common).dashboard_url


@contextmanager
def known_at(host: str) -> Iterator[None]:
    """The processes of a Ray that is started meanwhile know where it is.

    Otherwise Ray Train's helpers look for a Ray, and find what ``ray start`` has begun last on this machine: where that
    is gone, every run ends with half a minute of waiting; where it is alive, it knows nothing of our run, which is then
    taken for dead.
    """
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    os.environ["RAY_API_SERVER_ADDRESS"] = f"{host}:{port}"
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    try:
        yield
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


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
    run: Run,
    index: Index,
    vocabulary: Vocabulary,
    lanes: Sequence[int],
    cursor: Cursor,
    steps: int,
    tasks: int,
    repeated: np.ndarray = NONE,
) -> ray.data.Dataset:
    """Samples of some lanes, in order, from the cursor on, enough for ``steps`` more steps.

    Blocks, see ``blocks_of``, of ``lane, epoch, offset, uid, drop`` and the stacked arrays of ``SampleMaker``. A row
    that cannot be used has its reason in ``drop`` and zeros elsewhere, so that it is counted where its neighbours are
    trained on.

    Two stages: tasks that read rounds of windows and shuffle their rows, which wait more than they compute, and tasks
    that make samples of them, on any node of the cluster that has CPUs to spare.

    Args:
        tasks: CPUs that make samples.
        repeated: as ``WindowReader`` takes them.
    """
    order = order_of(run, index)
    # Rows may be dropped up to max_drop_fraction; one more window covers what rounding leaves.
    rows = steps * run.batch.micro / (1 - min(run.data.max_drop_fraction, 0.9)) + order.window
    windows = [w for lane in lanes for w in _enough(order.windows(lane, cursor.positions[lane], cursor.deals), rows)]
    rounds = [{"windows": [astuple(w) for w in windows]} for windows in rounds_of(windows, order.window)]
    dataset = ray.data.from_items(rounds, override_num_blocks=min(len(rounds), MAX_BLOCKS))
    dataset = dataset.map_batches(
        WindowReader(
            index, order, repeated, (*task_columns(run), *region_columns(run), *concept_columns(run), *tag_columns(run))
        ),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=max(1, tasks // SAMPLERS_PER_READER)),
        num_cpus=READER_CPUS,
    )
    dataset = dataset.map_batches(
        BlockMaker(run, vocabulary),
        batch_size=TASK_BLOCKS,
        batch_format="pyarrow",
        # One more than there are CPUs for: none of them idles while the next task is on its way.
        compute=ray.data.TaskPoolStrategy(size=tasks + 1),
        num_cpus=tasks / (tasks + 1),
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    # Without a limit reading runs ahead of sample making, and that of training, until the object store is full.
    limit = ray.data.ExecutionResources(object_store_memory=encoded_bytes(run) + made_bytes(run, tasks))
    context.execution_options.resource_limits = limit
    context.target_max_block_size = 1  # every row is a block
    context.enable_progress_bars = False
    return dataset


def encoded_bytes(run: Run) -> int:
    """Encoded rows in the object store, of pictures about as large as the tower's: of larger ones, fewer rows wait.

    Both stages share the limit. One that held many more of small pictures would be filled with samples, made beside the
    training's first steps and, where a run is short or stopped, for nobody.
    """
    row = 3 * run.vision.image_px**2 // COMPRESSION
    return min(ENCODED_BYTES, ENCODED_WINDOWS * run.data.shuffle_window * row)


def made_bytes(run: Run, tasks: int) -> int:
    """Samples in the object store, those that ``tasks`` CPUs are making for a worker and those that wait for it."""
    pictures = 1 + ("images" in task_columns(run))
    samples = BLOCK_ROWS * 3 * (pictures * run.vision.image_px**2 + code_image_px(run) ** 2)
    if run.regions is not None:
        samples += BLOCK_ROWS * 4 * run.regions.max * (4 + (run.regions.width or 0))
    return samples * (TASK_BLOCKS * (tasks + 1) + WAITING_BLOCKS)


def blocks_of(stream: ray.data.Dataset) -> Iterator[Block]:
    """The blocks of a training stream, as a worker takes them."""
    # A split of one: the executor lives in an actor of its own and does not share the interpreter with the step.
    (shard,) = stream.streaming_split(1)
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4):
        yield table_block(table)


def rounds_of(windows: Iterable[Window], size: int) -> list[list[Window]]:
    """Windows that are read together: those of all lanes at one place of their lane, so that the lanes keep step.

    Args:
        windows: of some lanes, in order within a lane.
        size: rows of a window.
    """

    def place(window: Window) -> tuple[int, int]:
        return window.epoch, window.start // size

    return [list(group) for _, group in itertools.groupby(sorted(windows, key=place), place)]


class _Kept:
    """The map function of an actor, which keeps what ``work`` has loaded."""

    def __init__(self, work: Work):
        self.work = work

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        yield from self.work(batch)


def job(
    items: Sequence[Mapping[str, Any]], work: Work, tasks: int, loads_model: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Run ``work`` over items, each a batch of one in a task of its own; its blocks as they come, in the items' order.

    Args:
        tasks: how many run at the same time.
        loads_model: the tasks run in actors, each with its ``work``, which share the cluster's GPUs, if it has any,
            up to ``TASKS_PER_GPU``.
    """
    dataset = ray.data.from_items(list(items), override_num_blocks=min(len(items), MAX_BLOCKS))
    if loads_model:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        tasks = min(tasks, TASKS_PER_GPU * gpus) if gpus else tasks
        dataset = dataset.map_batches(
            _Kept,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="numpy",
            # With fewer CPUs than tasks the others wait for ever, and the first does their work.
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=tasks, initial_size=tasks, max_tasks_in_flight_per_actor=1
            ),
            num_gpus=1 / -(-tasks // gpus) if gpus else 0,
        )
    else:
        dataset = dataset.map_batches(
            work, batch_size=1, batch_format="numpy", compute=ray.data.TaskPoolStrategy(size=tasks)
        )
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy")


class CaptionPass:
    """A Ray Data job over every row, that reads uids and captions only.

    Iterate for the cleaned captions, in file order; ``repeated`` is known when all of them were taken.
    """

    def __init__(self, index: Index, max_words: int, cpus: int):
        self.index, self.max_words, self.cpus = index, max_words, cpus
        self.repeated = NONE

    def __iter__(self) -> Iterator[str]:
        hashes = []
        items = [{"unit": i} for i in range(len(self.index.units))]
        for block in job(items, CaptionReader(self.index, self.max_words), self.cpus):
            hashes.append(block["uid"][block["first"]])
            yield from (str(c) for c in block["caption"] if c)
        self.repeated = repeats(np.concatenate(hashes))


def concept_counts(run: Run, index: Index, cpus: int) -> tuple[Counter[Concept], int]:
    """How many captions say each concept of phrases, and of how many captions, by a Ray Data job.

    The tasks count by unit, so what is gathered here grows with distinct concepts and not with captions.
    """
    counts: Counter[Concept] = Counter()
    captions = 0
    items = [{"unit": i} for i in range(len(index.units))]
    for block in job(items, ConceptReader(run, index), cpus):
        captions += int(block["captions"].sum())
        for concept, said in zip(block["concept"].tolist(), block["said"].tolist(), strict=True):
            counts[tuple(json.loads(concept))] += said
    return counts, captions


def patch_features(run: Run, index: Index, featurise: Featurise | None, cpus: int) -> np.ndarray:
    """(n, d) float32 features of the patches of ``codes.fit_images`` training images, by a Ray Data job.

    Args:
        featurise: patch features of a frozen tower; None takes pixels.
    """
    rng = np.random.default_rng([run.seed, 11])
    n = min(run.codes.fit_images, len(index))
    ordinals = np.sort(rng.choice(len(index), n, replace=False))
    chunks = [{"first": i, "last": min(i + 256, n)} for i in range(0, n, 256)]
    blocks = job(chunks, PatchReader(run, index, ordinals, featurise), cpus)
    return np.concatenate([b["features"] for b in blocks if len(b["features"])])


def region_features(run: Run, index: Index, featurise: RegionFeaturise, cpus: int) -> np.ndarray:
    """(n, d) float32 features of the regions of ``codes.fit_images`` training images, by a Ray Data job."""
    rng = np.random.default_rng([run.seed, 11])
    n = min(run.codes.fit_images, len(index))
    ordinals = np.sort(rng.choice(len(index), n, replace=False))
    chunks = [{"first": i, "last": min(i + 256, n)} for i in range(0, n, 256)]
    return np.concatenate([b["features"] for b in job(chunks, RegionReader(run, index, ordinals, featurise), cpus)])


def iterate_rows(index: Index, rank: int = 0, world: int = 1, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows rank, rank + world, ... of the first ``limit`` rows, every column, read in this process.

    Evaluation reads its rows so: nothing between the files and the metric can drop one.
    """
    ordinals = np.arange(rank, min(limit or len(index), len(index)), world)
    for unit, places, _ in index.locate(ordinals):
        for _, rows in read_pieces(unit, places, None, index.roots):
            yield from rows


def _enough(windows: Iterable[Window], rows: float) -> list[Window]:
    taken, total = [], 0
    for window in windows:
        taken.append(window)
        total += window.stop - window.start
        if total >= rows:
            break
    return taken

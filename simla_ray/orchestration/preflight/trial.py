"""Small trials before a run: one of its largest steps on noise, and the making of a few samples."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from simla_ray.config.schema import Run
from simla_ray.data.concept_tokens import column_phrases, concept_columns, concepts_for, phrases_in
from simla_ray.data.decode import DropRow
from simla_ray.data.index import Index
from simla_ray.data.questions import frequent_answers, task_columns
from simla_ray.data.regions import region_columns
from simla_ray.data.sample import SampleMaker
from simla_ray.data.schema import training_columns
from simla_ray.data.sources import read_rows
from simla_ray.data.tags import tag_columns
from simla_ray.data.text import build_vocabulary, clean
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast_dtype
from simla_ray.orchestration.preflight.footprint import STEPS, kinds_of_step, untrained
from simla_ray.training.comm import Comm
from simla_ray.training.measure import CLS_ID, synthetic_batch
from simla_ray.training.step import Losses, Step

SAMPLES = 16


@dataclass(frozen=True)
class Trial:
    """What a step showed: its pairs per second, and of a GPU the bytes at the peak and those that were free before.

    ``problem`` is why there was none, in a few words; without ``fits`` because memory was too small.
    """

    pairs_per_s: float = 0.0
    peak_bytes: int = 0
    free_bytes: int = 0
    problem: str = ""
    fits: bool = True


def try_step(run: Run, device_type: str) -> Trial:
    """Train a model of random weights on noise of the run's shapes: a step of every set of objectives, the last again.

    Two micro-batches where a worker has several, because the second finds the gradients of the first, and a step more,
    because only the second finds the optimiser's moments. The visual tokenizer is left out: the codes are noise, too.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        return Trial(problem=f"torch {torch.__version__} sees no GPU")
    device = torch.device(device_type)
    free = torch.cuda.mem_get_info(device)[0] if device_type == "cuda" else 0
    run = _small_step(run)
    threads, gpus = torch.get_num_threads(), [] if device_type == "cpu" else [torch.cuda.current_device()]
    if device_type == "cpu":
        torch.set_num_threads(max(1, int(run.ray.cpus_per_worker)))  # as a worker does
    try:
        with torch.random.fork_rng(gpus):
            seconds, pairs = _steps(run, device)
    except torch.OutOfMemoryError:
        return Trial(free_bytes=free, problem="out of memory", fits=False)
    finally:
        torch.set_num_threads(threads)
    peak = torch.cuda.max_memory_reserved(device) if device_type == "cuda" else 0
    return Trial(pairs / seconds, peak, free)


def _small_step(run: Run) -> Run:
    """One worker's part of a step, of at most two micro-batches, as a whole step; without what would only cost time."""
    pairs = run.batch.micro * min(2, -(-run.micro_batches // run.ray.workers))
    return untrained(run).model_copy(
        update={
            "compile": False,
            "queue": -(-run.queue // pairs) * pairs,  # it is written in whole steps
            "batch": run.batch.model_copy(update={"global_": pairs}),
            "ray": run.ray.model_copy(update={"workers": 1}),
        }
    )


def _steps(run: Run, device: torch.device) -> tuple[float, int]:
    """-> seconds of the last step, and its pairs."""
    with device:
        model = Model(run, run.text.vocab_size, autocast_dtype(run, device) or torch.float32)
    step = Step(run, Losses(run, model, None, CLS_ID, None).to(device).train(), STEPS, Comm(), device)
    batch = synthetic_batch(run, run.text.vocab_size).to(device)
    batches = [(number, batch) for number in range(run.micro_batches)]
    largest_last = sorted(kinds_of_step(run).items(), key=lambda kind: len(kind[1]))
    began = 0.0
    for number in [*(number for number, _ in largest_last), largest_last[-1][0]]:
        began = time.perf_counter()
        step(number, batches).grad_norm.item()  # waits for the device
    return time.perf_counter() - began, len(batches) * run.batch.micro


def samples_per_s(run: Run, train: Index) -> float | None:
    """Samples that one CPU makes in a second, from the first rows; None where none of them can be used.

    With a vocabulary of these rows' captions: the run's own need not be there yet, and pictures take the time.
    """
    unit = train.units[0]
    columns = training_columns((*task_columns(run), *region_columns(run), *concept_columns(run), *tag_columns(run)))
    rows = read_rows(unit, np.arange(min(SAMPLES + 1, len(unit))), columns, train.roots)
    most = run.text.max_words
    said_by = [(clean(caption, most), column_phrases(row)) for row in rows for caption in row["captions"]]
    captions = [caption for caption, _ in said_by]
    vocabulary = build_vocabulary(captions, run.text.model_copy(update={"vocab": "train"}))
    vocabulary.answers = tuple(frequent_answers([qa for row in rows for qa in row.get("qas") or ()], SAMPLES))
    if run.text.concepts:
        said = Counter(p.concept for c, given in said_by for p in phrases_in(c.split(), given, run.concepts, most))
        vocabulary.concepts = concepts_for(run, vocabulary, said, len(captions))
    make = SampleMaker(run, vocabulary, training=True)
    seconds = []
    for row in rows:
        began = time.perf_counter()
        try:
            make(row, 0)
        except DropRow:
            continue
        seconds.append(time.perf_counter() - began)
    return len(seconds[1:]) / sum(seconds[1:]) if len(seconds) > 1 else None  # the first one warms up

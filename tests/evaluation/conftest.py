"""A random tiny model, evaluation sets over the built-in world, and ranks that run as threads."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.work import Work
from simla_ray.models.model import Model


def make_scorer(vocabulary, **overrides) -> Scorer:
    """A tiny random model; ``objectives__itc=None`` stands for the key objectives.itc."""
    run = load_run(overrides={"size": "tiny"} | {key.replace("__", "."): value for key, value in overrides.items()})
    torch.manual_seed(0)
    model = Model(run, len(vocabulary))
    # Far from the start's near-constant outputs, so that orders are not decided by rounding.
    with torch.no_grad():
        for parameter in model.student.text.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        for parameter in model.student.vision.vit.patch_embed.parameters():
            parameter.mul_(3)
    return Scorer(run, model, vocabulary, torch.device("cpu"))


@pytest.fixture(scope="package")
def scorer(vocabulary):
    return make_scorer(vocabulary)


@pytest.fixture
def data(scorer, world_rows):
    """40 images with three captions each."""
    return EvalSet.load(scorer, world_rows["train"][:40], Work())


def on_ranks(world, function):
    """[function(rank, gather)] of ranks that run side by side; what they gather is pickled, as between processes."""
    barrier, slots = threading.Barrier(world), [None] * world

    def call(rank):
        torch.set_num_threads(1)  # a setting of the thread it is made in; more of them round differently

        def gather(own):
            slots[rank] = pickle.dumps(own)
            barrier.wait(60)
            every = [pickle.loads(slot) for slot in slots]
            barrier.wait(60)
            return every

        try:
            return function(rank, gather)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(call, rank) for rank in range(world)]
    errors = [e for e in (future.exception() for future in futures) if e is not None]
    # The other ranks only see that the barrier broke.
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]

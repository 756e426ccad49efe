"""One objective drawn a step: workers wrap their module once, agree on the draw, and make the steps of one worker."""

import os
import socket
import tempfile
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from simla_ray.training import step as step_module
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step, active_at
from tests.models.toy import CLS, NAMES, B, make_batch, make_model, make_run

CPU = torch.device("cpu")
STEPS = 8
SAMPLED = {"schedule__kind": "sampled", "text__dropout": 0.3, "batch__global": 4 * B}
ALONE = {
    "teacher": None, "objectives__psl__attention": "student", "objectives__psl__image_source": "student",
    **{f"objectives__{name}__soft_alpha": 0.0 for name in ("itc", "mlm", "psl")},
}  # fmt: skip
#: With a teacher; and without one, where the keys of ITC are the student's own.
RUNS = {"teacher": (NAMES, {}), "student": (("itc", "itm", "mlm", "psl"), ALONE)}


def toy(kind):
    on, more = RUNS[kind]
    return make_run(on, **SAMPLED, **more)


class Wrapper(nn.Module):
    """Stands in for DistributedDataParallel, and counts."""

    made: list[dict] = []

    def __init__(self, module, **options):
        super().__init__()
        self.module = module
        self.made.append(options)

    def forward(self, *arguments):
        return self.module(*arguments)

    def no_sync(self):
        return nullcontext()


@pytest.fixture
def wrappers(monkeypatch):
    monkeypatch.setattr(step_module, "DistributedDataParallel", Wrapper)
    monkeypatch.setattr(Wrapper, "made", [])
    return Wrapper.made


def of_two(run):
    """The step of a worker that has another beside it, which is not asked."""
    comm = Comm()
    comm.world = 2
    return Step(run, Losses(run, make_model(run), None, CLS, None), 20, comm, CPU)


def test_one_wrapper_serves_all_steps(wrappers):
    run = toy("teacher")
    step = of_two(run)
    drawn = [active_at(run, s, 20) for s in range(20)]
    assert sum(a != b for a, b in pairwise(drawn)) > 10
    trained = set()
    for s in range(20):
        sums = step(s, [(0, make_batch(s)), (2, make_batch(s + 1))]).sums
        assert drawn[s] == {name for name in NAMES if name in sums}
        trained |= drawn[s]
    assert trained == set(NAMES)
    assert [made["find_unused_parameters"] for made in wrappers] == [True]


def test_a_phase_has_a_wrapper_of_its_own(wrappers):
    phases = [{"until": 0.5, "objectives": ["itc"]}, {"until": 1.0, "objectives": list(NAMES)}]
    step = of_two(make_run(schedule__kind="phases", schedule__phases=phases, batch__global=4 * B))
    for s in range(20):
        step(s, [(0, make_batch(s))])
    assert [made["find_unused_parameters"] for made in wrappers] == [False, False]


def steps_of(run, rank=0, world=1):
    """-> sums of every step, its gradients as the optimiser gets them, and the weights in the end."""
    model = make_model(run).double()
    step = Step(run, Losses(run, model, None, CLS, None), STEPS, Comm(), CPU)
    every, found = [], {}
    step.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    for s in range(STEPS):
        found.clear()
        numbers = range(rank, run.micro_batches, world)
        out = step(s, [(n, make_batch(10 * s + n)) for n in numbers])
        every.append(({name: float(value) for name, value in out.sums.items()}, dict(found), float(out.grad_norm)))
    return every, {n: p.detach().clone() for n, p in model.named_parameters()}


def two_workers(rank, port, kind, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(steps_of(toy(kind), rank, 2), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_two_workers_make_the_steps_of_one(kind):
    """Losses, and the gradients of what a step has used; what it has not used gets none on any worker."""
    run = toy(kind)
    assert len({frozenset(active_at(run, s, STEPS)) for s in range(STEPS)}) > 2
    alone, weights = steps_of(run)
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        mp.spawn(two_workers, args=(port, kind, folder), nprocs=2)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    unused = 0
    for number, (sums, gradients, norm) in enumerate(alone):
        of_ranks = [every[number] for every, _ in results]
        for name, value in sums.items():
            bound = 1e-6 if "/" in name else 1e-8  # metrics are float32
            assert np.sum([r[0][name] for r in of_ranks]) == pytest.approx(value, rel=bound, abs=1e-12), (number, name)
        for _, theirs, their_norm in of_ranks:
            assert theirs.keys() == gradients.keys(), number
            assert their_norm == pytest.approx(norm, rel=1e-8)
            for name, grad in gradients.items():
                torch.testing.assert_close(theirs[name], grad, rtol=1e-7, atol=1e-10, msg=f"{number} {name}")
        unused += len(weights) - len(gradients)
    assert unused > 0
    for _, theirs in results:
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-6, atol=1e-9, msg=name)

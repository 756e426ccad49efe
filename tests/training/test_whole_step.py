"""ITC among all pairs of a step: the same loss and gradients for any split into micro-batches and workers."""

import math
import os
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from simla_ray.objectives.contrastive import itc_loss
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step
from tests.models.toy import CLS, B, make_batch, make_model, make_run

CPU = torch.device("cpu")
TWO_TOWERS = {
    "teacher": None, "objectives__itc__scope": "step", "objectives__itc__soft_alpha": 0.0, "batch__global": 4 * B,
    "temperature__kind": "log_scale", "temperature__max": 1.0, "optim__clip": None, "text__dropout": 0.3,
}  # fmt: skip
SIGMOID = {"objectives__itc__loss": "sigmoid", "temperature__init": 0.1, "objectives__itc__bias": -10.0}


def toy(method, **more):
    return make_run(("itc",), **{**TWO_TOWERS, **(SIGMOID if method == "siglip" else {}), **more})


def numbered(*numbers):
    return [(n, make_batch(n)) for n in numbers]


def run_step(run, batches, dtype=torch.float64):
    """-> sums and gradients of one step."""
    model = make_model(run).to(dtype)
    step = Step(run, Losses(run, model, None, CLS, None), 10, Comm(), CPU)
    gradients = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    out = step(3, batches)
    return {n: v / len(batches) for n, v in out.sums.items()}, gradients


def by_loops(image, text, scale, bias):
    """CLIP's loss, or with a bias SigLIP's, pair by pair."""
    n, total = len(image), 0.0
    for i in range(n):
        rows = (
            [scale * float(image[i] @ text[j]) for j in range(n)],
            [scale * float(text[i] @ image[j]) for j in range(n)],
        )
        if bias is None:
            total += sum(math.log(sum(math.exp(s) for s in row)) - row[i] for row in rows) / 2
        else:
            signs = [1 if i == j else -1 for j in range(n)]
            total += sum(math.log1p(math.exp(-z * (s + bias))) for z, s in zip(signs, rows[0], strict=True))
    return total / n


@pytest.mark.parametrize("method", ["clip", "siglip"])
def test_the_loss_sees_every_pair_of_the_step(method):
    run = toy(method, text__dropout=0.0)
    batches = numbered(0, 1, 2)
    model = make_model(run).double()
    with torch.no_grad():
        image = torch.cat([model.student.image_vector(model.student.vision(b.image)) for _, b in batches]).numpy()
        text = torch.cat(
            [model.student.text_vector(model.student.text.encode(b.token_ids, b.token_mask)) for _, b in batches]
        ).numpy()
    bias = model.scale.bias.item() if method == "siglip" else None
    sums, _ = run_step(run, batches)
    assert sums["itc"].item() == pytest.approx(by_loops(image, text, 1 / model.temperature.item(), bias), rel=1e-6)
    assert sums["total"].item() == pytest.approx(sums["itc"].item())


@pytest.mark.parametrize("method", ["clip", "siglip"])
def test_gradients_equal_those_of_one_large_graph(method):
    """Vectors first and towers later is only a way to save memory."""
    run = toy(method, text__dropout=0.0, objectives__itc__weight=2.0, batch__global=3 * B)
    batches = numbered(0, 1, 2)
    sums, gradients = run_step(run, batches)
    model = make_model(run).double()
    image = torch.cat([model.student.image_vector(model.student.vision(b.image)) for _, b in batches])
    text = torch.cat(
        [model.student.text_vector(model.student.text.encode(b.token_ids, b.token_mask)) for _, b in batches]
    )
    logits = image @ text.T / model.temperature
    own = torch.arange(len(logits))
    if method == "siglip":
        sign = 2 * torch.eye(len(logits)) - 1
        loss = -torch.nn.functional.logsigmoid(sign * (logits + model.scale.bias)).sum() / len(logits)
    else:
        entropy = torch.nn.functional.cross_entropy
        loss = (entropy(logits, own) + entropy(logits.T, own)) / 2
    (2 * loss).backward()
    assert sums["itc"].item() == pytest.approx(loss.item(), rel=1e-10)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == gradients.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(gradients[name], grad, rtol=1e-8, atol=1e-10, msg=name)


def test_captions_of_one_image_can_be_positives_across_micro_batches():
    run = toy("clip", objectives__itc__same_image="positive", text__dropout=0.0)
    batches = numbered(0, 1)
    ids = torch.arange(2 * B) % B
    for (_, batch), part in zip(batches, ids.split(B), strict=True):
        batch.image_id = part
    model = make_model(run).double()
    with torch.no_grad():
        image = torch.cat([model.student.image_vector(model.student.vision(b.image)) for _, b in batches])
        text = torch.cat(
            [model.student.text_vector(model.student.text.encode(b.token_ids, b.token_mask)) for _, b in batches]
        )
        together = itc_loss(image, text, image, text, model.temperature, 0.0, None, None, ids, ids).loss
        own = itc_loss(image, text, image, text, model.temperature).loss
    sums, _ = run_step(run, batches)
    assert sums["itc"].item() == pytest.approx(together.item(), rel=1e-9)
    assert abs(own.item() / together.item() - 1) > 1e-6


def two_workers(rank, port, method, micros, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sums, gradients = run_step(toy(method, batch__global=micros * B), numbered(*range(rank, micros, 2)))
    torch.save((sums, gradients), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "micros"), [("clip", 4), ("siglip", 4), ("clip", 3), ("siglip", 3)])
def test_two_workers_make_the_step_of_one(method, micros):
    """Dropout on; the gradient that each worker holds after the reduction is that of the whole."""
    shares = [range(rank, micros, 2) for rank in (0, 1)]
    alone, expected = run_step(toy(method, batch__global=micros * B), numbered(*shares[0], *shares[1]))
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        mp.spawn(two_workers, args=(port, method, micros, folder), nprocs=2)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    together = np.average([sums["itc"].item() for sums, _ in results], weights=[len(share) for share in shares])
    assert together == pytest.approx(alone["itc"].item(), rel=1e-10)
    for _, gradients in results:
        for name, grad in expected.items():
            torch.testing.assert_close(gradients[name], grad, rtol=1e-8, atol=1e-10, msg=name)


def test_open_clip_computes_the_same():
    loss = pytest.importorskip("open_clip.loss", reason="open_clip is not installed")
    run = toy("clip", text__dropout=0.0)
    batches = numbered(0)
    model = make_model(run).double()
    image = model.student.image_vector(model.student.vision(batches[0][1].image))
    text = model.student.text_vector(model.student.text.encode(batches[0][1].token_ids, batches[0][1].token_mask))
    theirs = loss.ClipLoss()(image, text, 1 / model.temperature)
    theirs.backward()
    sums, gradients = run_step(run, batches)
    assert sums["itc"].item() == pytest.approx(theirs.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10)

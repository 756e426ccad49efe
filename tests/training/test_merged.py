"""ViLT's step: it learns, it goes on after a stop as if there had been none, and it has no vectors to keep."""

import copy

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.models.model import Model
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step
from simla_ray.training.validation import fixed_losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(world_rows, vocabulary):
    """Run, and micro-batches of the built-in world: three of training, one of validation."""
    run = load_run(
        overrides=["method=vilt", "batch.global=32", "text.dropout=0.1", "optim.warmup_steps=5", "ray.workers=1"]
    )
    makers = {split: SampleMaker(run, vocabulary, training=split == "train") for split in ("train", "val")}
    rows = [world_rows["train"][i : i + 32] for i in (0, 32, 64)] + [world_rows["val"][:32]]
    batches = [
        collate(stacked([makers["val" if n == 3 else "train"](row, 0) for row in part]), run)
        for n, part in enumerate(rows)
    ]
    return run, batches[:3], batches[3]


def begin(run, vocabulary, total=40):
    torch.manual_seed(0)
    losses = Losses(run, Model(run, len(vocabulary)), None, vocabulary.cls_id, None).train()
    return Step(run, losses, total, Comm(), CPU)


def test_words_are_learnt_in_a_few_dozen_steps(made, vocabulary):
    run, batches, val = made
    step = begin(run, vocabulary)

    def measure():
        return fixed_losses(run, step.losses, [(0, val)], 1, Comm(), CPU)

    before = measure()
    assert set(before) == {"itm_hard", "itm_accuracy", "mlm_hard", "mlm_accuracy", "wpa_hard"}
    for i in range(40):
        out = step(i, [(0, batches[i % 3])])
        assert out.grad_norm.isfinite()
    after = measure()
    assert after["mlm_hard"] < 0.75 * before["mlm_hard"]


@pytest.mark.slow
def test_eight_pairs_are_learnt_by_heart(world_rows, vocabulary):
    """Which picture goes with which caption, whichever half is swapped; transport then is cheaper for true pairs."""
    keys = ["batch.global=8", "batch.micro=8", "optim.warmup_steps=5", "optim.lr=2e-3", "ray.workers=1"]
    keys += ["objectives.wpa.weight=0.1", "objectives.mlm.p=0.25"]  # as published: no recipe is needed for eight
    run = load_run(overrides=["method=vilt", *keys])
    maker = SampleMaker(run, vocabulary, training=False)
    batch = collate(stacked([maker(row, 0) for row in world_rows["train"][:8]]), run)
    step = begin(run, vocabulary, 400)
    found = [step(i, [(0, batch)]).sums for i in range(400)]
    last = {name: sum(float(sums[name]) for sums in found[-10:]) / 10 for name in found[0]}
    assert last["itm/accuracy"] > 0.95 and last["itm/hard"] < 0.2
    assert last["mlm/hard"] < 0.1 and last["wpa/gap"] > 0.1


def test_going_on_after_a_stop_changes_nothing(made, vocabulary):
    run, batches, _ = made
    whole = begin(run, vocabulary)
    straight = [whole(i, [(0, batches[i % 3])]).sums for i in range(4)]
    first = begin(run, vocabulary)
    for i in range(2):
        first(i, [(0, batches[i % 3])])
    kept = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    torch.manual_seed(99)
    second = begin(run, vocabulary)
    second.model.load_state_dict(kept[0])
    second.optimizer.load_state_dict(kept[1])
    for i in (2, 3):
        again = second(i, [(0, batches[i % 3])]).sums
        assert {name: float(v) for name, v in again.items()} == {name: float(v) for name, v in straight[i].items()}

"""MVPTR's step: passes, learning, going on after a stop, and no parameter without a gradient whatever is on."""

import copy

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.region_source import with_regions
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.data.tag_source import with_tags
from simla_ray.models.model import Model
from simla_ray.models.stack import Stack
from simla_ray.training.comm import Comm
from simla_ray.training.measure import synthetic_batch
from simla_ray.training.step import Losses, Step
from simla_ray.training.validation import fixed_losses
from tests.models.toy import with_concepts

CPU = torch.device("cpu")
KEYS = ["batch.global=32", "optim.warmup_steps=5", "ray.workers=1", "concepts.most=300", "regions.grid=3"]


def decided(method, *overrides):
    return with_tags(with_regions(load_run(overrides=[f"method={method}", *KEYS, *overrides]), None), None)


@pytest.fixture(scope="module", params=["mvptr", "mvptr-grid", "mvptr-psl"])
def made(request, world_rows, vocabulary):
    """Run, vocabulary, three micro-batches of training, one of validation."""
    run = decided(request.param)
    vocabulary = with_concepts(vocabulary, world_rows["train"], run)
    makers = {split: SampleMaker(run, vocabulary, training=split == "train") for split in ("train", "val")}
    rows = [world_rows["train"][i : i + 32] for i in (0, 32, 64)] + [world_rows["val"][:32]]
    batches = [
        collate(stacked([makers["val" if n == 3 else "train"](row, 0) for row in part]), run)
        for n, part in enumerate(rows)
    ]
    return run, vocabulary, batches[:3], batches[3]


def begin(run, vocabulary, total=40):
    torch.manual_seed(0)
    losses = Losses(run, Model(run, len(vocabulary)), None, vocabulary.cls_id, None).train()
    return Step(run, losses, total, Comm(), CPU)


def test_words_tags_and_phrases_are_learnt_in_a_few_dozen_steps(made):
    run, vocabulary, batches, val = made
    step = begin(run, vocabulary)

    def measure():
        return fixed_losses(run, step.losses, [(0, val)], 1, Comm(), CPU)

    before = measure()
    for i in range(40):
        assert step(i, [(0, batches[i % 3])]).grad_norm.isfinite()
    after = measure()
    assert after["mlm_hard"] < 0.8 * before["mlm_hard"]
    if "mcr" in run.objectives.active():
        assert after["mcr_hard"] < 0.7 * before["mcr_hard"]
    assert after["wpg_hard"] < before["wpg_hard"] + 0.02


def test_going_on_after_a_stop_changes_nothing(made):
    run, vocabulary, batches, _ = made
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


def test_a_step_has_two_fused_passes_and_one_of_each_tower(made, monkeypatch):
    """Sequences that go through each stack, in units of the micro-batch (methods.md, 6.3)."""
    run, vocabulary, batches, _ = made
    step, passes = begin(run, vocabulary), []
    plain = Stack.forward
    monkeypatch.setattr(
        Stack, "forward", lambda self, x, *a, **k: passes.append((id(self), len(x))) or plain(self, x, *a, **k)
    )
    step(39, [(0, batches[0])])  # the first phase is without ITM
    student = step.model.student
    B = len(batches[0])
    assert sorted(passes) == sorted(
        [(id(student.text.encoder), B), (id(student.vision.encoder), B), (id(student.merging.encoder), 2 * B)]
    )


@pytest.mark.parametrize("name", ["itc", "itm", "mlm", "mcr", "wpg", "itc,mcr", "mlm,wpg"])
def test_what_trains_is_what_gets_a_gradient(made, name):
    run, vocabulary, batches, _ = made
    if "mcr" in name and "mcr" not in run.objectives.active():
        pytest.skip("this form has no tags to recover")
    active = set(name.split(","))
    losses = begin(run, vocabulary).losses
    losses.model.trainable_in(active)
    total, terms, _, _ = losses(batches[0], active, dict.fromkeys(active, 0.0), 0.0)
    total.backward()
    assert set(terms) == active
    for parameter_name, parameter in losses.model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, parameter_name


def test_a_batch_without_phrases_or_masked_tags_gives_zeros(made):
    run, vocabulary, batches, _ = made
    batch = copy.copy(batches[0])
    batch.token_ids = batch.token_ids.masked_fill(batch.is_concept, 0)
    batch.is_concept, batch.mcr_weight = torch.zeros_like(batch.is_concept), torch.zeros_like(batch.mcr_weight)
    losses = begin(run, vocabulary).losses
    active = set(run.objectives.active())
    total, terms, _, _ = losses(batch, active, dict.fromkeys(active, 0.0), 0.0)
    total.backward()
    assert terms["wpg"].loss == 0 and total.isfinite()
    assert "mcr" not in terms or terms["mcr"].loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in losses.model.parameters())


def test_a_batch_of_noise_has_all_that_a_step_reads(made):
    """What memory and cost are measured with."""
    run, vocabulary, _, _ = made
    batch = synthetic_batch(run, len(vocabulary), [9] * run.batch.micro)
    assert batch.token_ids.shape[1] <= run.text.length and batch.is_concept.any()
    assert begin(run, vocabulary)(0, [(0, batch)]).grad_norm.isfinite()

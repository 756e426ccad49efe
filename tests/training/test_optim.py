"""Decay groups and the learning rate by hand numbers."""

import itertools
import math

import pytest

from simla_ray.config.schema import Optim
from simla_ray.training.optim import build_optimizer, learning_rate, named_parameters
from tests.models.toy import make_model, make_run


def groups(**optim):
    """name -> (weight decay, learning-rate factor)"""
    run = make_run(queue=16, **{f"optim__{k}": v for k, v in optim.items()})
    model = make_model(run)
    optimizer = build_optimizer(model, run.optim)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) in names and names[id(p)] not in found
            found[names[id(p)]] = group["weight_decay"], group["factor"]
    assert set(found) == {n for n, _ in named_parameters(model)}
    return model, found


TABLES = {
    "student.vision.vit.pos_embed",
    "student.vision.vit.cls_token",
    "student.vision.mask_token",
    "student.text.embeddings.word_embeddings.weight",
    "student.text.embeddings.position_embeddings.weight",
    "scale.temperature",
}


def test_standard_spares_vectors_biases_tables_tokens_and_the_temperature():
    model, found = groups(no_decay="standard", weight_decay=0.02)
    for name, p in named_parameters(model):
        spared = p.ndim <= 1 or name.endswith(".bias") or name in TABLES
        assert found[name][0] == (0 if spared else 0.02), name
    assert found["student.vision.vit.patch_embed.proj.weight"][0] == 0.02
    assert found["student.concept_head.weight"][0] == 0.02


def test_official_spares_vectors_and_biases_only():
    model, found = groups(no_decay="official", weight_decay=0.02)
    for name, p in named_parameters(model):
        spared = p.ndim == 1 or name.endswith(".bias")
        assert found[name][0] == (0 if spared else 0.02), name
    assert all(found[name][0] == 0.02 for name in TABLES)  # the temperature has no dimension at all


def test_the_teacher_is_not_trained():
    _, found = groups()
    assert not any(name.startswith("teacher.") for name in found)


def test_factors_belong_to_temperature_and_concept_head():
    _, found = groups(temperature_lr_factor=0.02, concept_lr_factor=3.0)
    assert found.pop("scale.temperature")[1] == 0.02
    assert found.pop("student.concept_head.weight")[1] == 3
    assert found.pop("student.concept_head.bias")[1] == 3
    assert {factor for _, factor in found.values()} == {1.0}


def test_adamw_takes_its_keys():
    run = make_run(optim__betas=[0.8, 0.9], optim__eps=1e-5, optim__lr=0.5)
    optimizer = build_optimizer(make_model(run), run.optim)
    assert all((g["betas"], g["eps"], g["lr"]) == ((0.8, 0.9), 1e-5, 0.5) for g in optimizer.param_groups)


def test_learning_rate_hand_numbers():
    optim = Optim(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(s, 13, optim) for s in range(13)]
    assert rates[:4] == pytest.approx([0.325, 0.55, 0.775, 1.0])  # 0.1 + 0.9 (s + 1) / 4
    assert rates[4] == pytest.approx(1.0)
    assert rates[8] == pytest.approx(0.55)  # half of the cosine
    assert rates[6] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates[12] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_learning_rate_without_warm_up_and_with_nothing_else():
    assert learning_rate(0, 10, Optim(lr=1.0, min_lr=0.1, warmup_steps=0)) == pytest.approx(1.0)
    short = Optim(lr=1.0, min_lr=0.1, warmup_steps=2000)
    assert learning_rate(9, 10, short) == pytest.approx(1.0)  # the warm-up is cut to the run
    assert learning_rate(0, 1, short) == pytest.approx(1.0)


def test_the_last_step_has_the_smallest_rate():
    """`learning_rate`: "a cosine back to min_lr at the last step"."""
    assert learning_rate(9, 10, Optim(lr=1.0, min_lr=0.1, warmup_steps=0)) == pytest.approx(0.1)

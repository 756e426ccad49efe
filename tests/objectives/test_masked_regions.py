"""Masked region losses against a loop and by hand."""

import math

import numpy as np
import pytest
import torch

from simla_ray.config.enums import Reduction
from simla_ray.objectives.masked_regions import mrc_loss, mrckl_loss, mrfr_loss

B, M, C, D = 3, 4, 5, 6


@pytest.fixture
def made():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, M, C, generator=g, dtype=torch.float64)
    target = torch.rand(B, M, C, generator=g, dtype=torch.float64)
    target[0, 0, 0], target[1, 1, 2] = 9, 0  # background that is likeliest; a class with nothing
    target /= target.sum(-1, keepdim=True)
    weight = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    return logits, target, weight


def slow_log_softmax(row):
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def test_classes_equal_a_loop(made):
    logits, target, weight = made
    total, kl, n, right = 0.0, 0.0, 0, 0
    for b in range(B):
        for m in range(M):
            if not weight[b, m]:
                continue
            log_p, q, n = slow_log_softmax(logits[b, m].numpy()), target[b, m].numpy(), n + 1
            label = 1 + int(np.argmax(q[1:]))
            total -= log_p[label]
            right += int(np.argmax(log_p)) == label
            kl += sum(x * (math.log(x) - log_p[c]) for c, x in enumerate(q) if x > 0)
    term = mrc_loss(logits, target, weight)
    assert float(term.loss) == pytest.approx(total / n, rel=1e-12)
    assert float(term.metrics["accuracy"]) == pytest.approx(right / n)
    assert float(mrckl_loss(logits, target, weight, Reduction.region).loss) == pytest.approx(kl / n, rel=1e-12)
    assert float(mrckl_loss(logits, target, weight, Reduction.element).loss) == pytest.approx(kl / n / C, rel=1e-12)


def test_features_by_hand_and_without_a_gradient_to_the_target():
    prediction = torch.zeros(1, 2, 2, requires_grad=True)
    target = torch.tensor([[[1.0, 3.0], [100.0, 100.0]]], requires_grad=True)
    term = mrfr_loss(prediction, target, torch.tensor([[1.0, 0.0]]))
    assert float(term.loss.detach()) == pytest.approx(5.0)
    term.loss.backward()
    assert target.grad is None and prediction.grad[0, 0].tolist() == [-1.0, -3.0] and not prediction.grad[0, 1].any()


def test_a_batch_without_hidden_regions_gives_zero(made):
    logits, target, weight = made
    nothing = torch.zeros_like(weight)
    for term in (
        mrfr_loss(logits, target, nothing), mrc_loss(logits, target, nothing),
        mrckl_loss(logits, target, nothing, Reduction.element),
    ):  # fmt: skip
        assert float(term.loss) == 0


def test_what_is_surely_background_has_no_class_to_name():
    logits, target = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]])
    term = mrc_loss(logits, target, torch.ones(1, 2))
    assert float(term.loss) == pytest.approx(math.log(3))
    target[0, 1] = target[0, 0]
    assert float(mrc_loss(logits, target, torch.ones(1, 2)).loss) == 0


def test_a_right_answer_costs_nothing(made):
    _, target, weight = made
    logits = target.clamp(min=1e-300).log()
    assert float(mrckl_loss(logits, target, weight, Reduction.region).loss) == pytest.approx(0, abs=1e-12)
    assert float(mrckl_loss(logits, target, weight, Reduction.region).metrics["accuracy"]) == 1

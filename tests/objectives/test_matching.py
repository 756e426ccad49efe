"""ITM by hand: cross-entropy over 3B rows, the first B are matches, index 1 means match."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.objectives.matching import itm_loss


def test_hand_numbers():
    assert itm_loss(torch.zeros(6, 2)).loss.item() == pytest.approx(math.log(2))
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])  # B = 1: one match, two mismatches, all called a match
    hit, miss = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    term = itm_loss(logits)
    assert term.loss.item() == pytest.approx((hit + 2 * miss) / 3)
    assert term.metrics["accuracy"].item() == pytest.approx(1 / 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_equals_the_reference(seed, B):
    logits = np.random.default_rng(seed).normal(size=(3 * B, 2)) * 5
    expected = np.mean([
        -(row[1 if i < B else 0] - np.log(np.exp(row).sum())) for i, row in enumerate(logits)
    ])  # fmt: skip
    term = itm_loss(torch.from_numpy(logits))
    assert term.loss.item() == pytest.approx(expected, rel=1e-10)
    assert term.metrics["hard"].item() == pytest.approx(expected, rel=1e-10)


def test_bfloat16_logits_give_a_float32_loss():
    assert itm_loss(torch.zeros(3, 2, dtype=torch.bfloat16)).loss.dtype == torch.float32


def test_rows_may_bring_their_labels():
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    term = itm_loss(logits, torch.tensor([0, 1]))
    assert term.loss.item() == pytest.approx((math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2))) / 2)
    assert term.metrics["accuracy"].item() == 0.5

"""Dropout of our own on a CPU, against the same sums written plainly."""

import math

import pytest
import torch

from simla_ray.models.dropout import Dropout, attend_with_dropout, attention_probabilities, cheap_on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_share_it_should_and_keeps_the_mean(dtype):
    x = torch.ones(1000, 333, dtype=dtype)
    assert cheap_on(x)
    torch.manual_seed(0)
    out = Dropout(0.1).train()(x)
    assert out.dtype == dtype and out.shape == x.shape
    values = out.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.9], dtype=dtype))
    share = (out == 0).double().mean().item()
    assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / x.numel()))
    columns = (out == 0).double().mean(0)  # no lane of the generator's words is drawn differently
    assert columns.min() > 0.05 and columns.max() < 0.15


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8])
def test_any_number_of_elements_gets_a_mask(n):
    assert Dropout(0.5).train()(torch.ones(n)).shape == (n,)


def test_the_same_seed_draws_the_same_and_another_another():
    x, layer = torch.ones(4096), Dropout(0.3).train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_off_in_evaluation_and_at_zero():
    x, residual = torch.randn(5, 6), torch.randn(5, 6)
    for layer in (Dropout(0.4).eval(), Dropout(0.0).train()):
        assert torch.equal(layer(x), x)
        assert torch.equal(layer.add(x, residual), residual + x)


def test_added_to_a_residual_it_is_the_sum_and_so_are_its_gradients():
    p, layer = 0.3, Dropout(0.3).train()
    x = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 9, dtype=torch.float64)
    torch.manual_seed(3)
    out = layer.add(x, residual)
    gradients = torch.autograd.grad((out * weight).sum(), (x, residual))

    mask = ((out - residual).abs() > 0).double()
    assert 0 < mask.mean() < 1
    expected = residual + mask * x / (1 - p)
    torch.testing.assert_close(out, expected)
    for got, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), (x, residual)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_plain_one_with_the_same_mask(masked):
    p, shape = 0.4, (2, 3, 5, 8)
    torch.manual_seed(0)
    # As the layers hand them over: heads split off a row, so not contiguous.
    query, key, value = (
        torch.randn(2, length, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for length in (5, 7, 7)
    )
    allowed = torch.rand(2, 1, 1, 7) > 0.3 if masked else None
    weight = torch.randn(shape, dtype=torch.float64)

    # The value rows are the unit vectors once, which shows the dropped probabilities themselves.
    unit = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    probabilities = attention_probabilities(query, key, allowed)
    if masked:
        assert (probabilities[(~allowed).expand_as(probabilities)] == 0).all()
    torch.manual_seed(5)
    shown = attend_with_dropout(query, key, unit, allowed, p)
    mask = (shown.detach() > 0).double()
    assert 0.2 < mask.mean() < 0.8
    torch.testing.assert_close(shown, probabilities * mask / (1 - p))

    torch.manual_seed(5)
    got = attend_with_dropout(query, key, value, allowed, p)
    expected = (probabilities * mask / (1 - p)) @ value
    torch.testing.assert_close(got, expected)
    inputs = (query, key, value)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_attention_under_autocast_runs_back_and_forth():
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_with_dropout(query.bfloat16(), key.bfloat16(), value.bfloat16(), None, 0.2)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in (query, value))

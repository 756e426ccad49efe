"""WPA against loops over numbers, its marginals, and by hand."""

import numpy as np
import pytest
import torch

from simla_ray.objectives.word_patch import transport_plan, wpa_loss


def slow_plan(cost, beta=0.5, iterations=50):
    """IPOT of one problem, (m, n), entry by entry."""
    m, n = cost.shape
    plan, sigma = np.ones((m, n)), np.full(m, 1 / m)
    for _ in range(iterations):
        scaled = np.array([[np.exp(-cost[i, j] / beta) * plan[i, j] for j in range(n)] for i in range(m)])
        delta = np.array([1 / (n * sum(scaled[i, j] * sigma[i] for i in range(m))) for j in range(n)])
        sigma = np.array([1 / (m * sum(scaled[i, j] * delta[j] for j in range(n))) for i in range(m)])
        plan = np.array([[sigma[i] * scaled[i, j] * delta[j] for j in range(n)] for i in range(m)])
    return plan


def problem(m=7, n=11, seed=0):
    rng = np.random.default_rng(seed)
    words, patches = rng.normal(size=(m, 8)), rng.normal(size=(n, 8))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (words, patches)]
    return words, patches, 1 - unit[0] @ unit[1].T


def test_the_plan_equals_loops_and_keeps_its_marginals():
    _, _, cost = problem()
    plan = transport_plan(torch.tensor(cost)[None], torch.ones(1, 7, dtype=torch.bool), 0.5, 50)[0].numpy()
    np.testing.assert_allclose(plan, slow_plan(cost), rtol=1e-9)
    np.testing.assert_allclose(plan.sum(1), 1 / 7, atol=1e-15)
    np.testing.assert_allclose(plan.sum(0), 1 / 11, atol=2e-3)
    assert (plan * cost).sum() < 0.6 * cost.mean()  # 1/(mn) everywhere is the uniform plan


def test_padded_rows_change_nothing():
    costs = [problem(m, 5, seed=m)[2] for m in (3, 1, 4)]
    padded, mask = torch.full((3, 4, 5), 0.123, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.bool)
    for b, cost in enumerate(costs):
        padded[b, : len(cost)], mask[b, : len(cost)] = torch.tensor(cost), True
    plans = transport_plan(padded, mask, 0.5, 50)
    for b, cost in enumerate(costs):
        np.testing.assert_allclose(plans[b, : len(cost)], slow_plan(cost), rtol=1e-9)
        assert not plans[b, len(cost) :].any()


def test_the_loss_equals_loops_and_its_gradient_goes_through_the_costs_alone():
    pairs = [problem(m, 6, seed=m) for m in (4, 2, 3)]
    words, mask = torch.zeros(3, 4, 8, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.bool)
    for b, (own, _, _) in enumerate(pairs):
        words[b, : len(own)], mask[b, : len(own)] = torch.tensor(own), True
    patches = torch.stack([torch.tensor(p) for _, p, _ in pairs]).requires_grad_()
    words.requires_grad_()
    term = wpa_loss(words, mask, patches, torch.tensor([1, 0, 1]), 0.5, 50)
    costs = [(slow_plan(cost) * cost).sum() for _, _, cost in pairs]
    assert term.loss.item() == pytest.approx((costs[0] - costs[1] + costs[2]) / 3, rel=1e-9)
    assert term.metrics["gap"].item() == pytest.approx(costs[1] - (costs[0] + costs[2]) / 2, rel=1e-9)
    term.loss.backward()
    w, p = (t.detach().clone().requires_grad_() for t in (words, patches))
    unit = [torch.nn.functional.normalize(t, dim=-1) for t in (w, p)]
    fixed = torch.zeros(3, 4, 6, dtype=torch.float64)
    for b, (own, _, cost) in enumerate(pairs):
        fixed[b, : len(own)] = torch.tensor(slow_plan(cost))
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)[:, None, None] / 3
    (signs * fixed * (1 - unit[0] @ unit[1].transpose(1, 2))).sum().backward()
    torch.testing.assert_close(words.grad, w.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(patches.grad, p.grad, rtol=1e-9, atol=1e-12)


def test_by_hand_and_monotone_in_the_cosine():
    """One word and one patch: the whole mass moves once, d = 1 - cosine."""
    mask, label = torch.ones(1, 1, dtype=torch.bool), torch.tensor([1])
    found = []
    for cosine in (-1.0, -0.5, 0.0, 0.6, 1.0):
        word = torch.tensor([[[cosine, (1 - cosine**2) ** 0.5]]])
        found.append(wpa_loss(word, mask, torch.tensor([[[2.0, 0.0]]]), label, 0.5, 50).loss.item())
    assert found == pytest.approx([2.0, 1.5, 1.0, 0.4, 0.0], abs=1e-6)
    words, patches = (torch.randn(1, k, 8, generator=torch.Generator().manual_seed(k)) for k in (5, 9))
    common = torch.ones(8)
    costs = [
        wpa_loss(words + a * common, torch.ones(1, 5).bool(), patches + a * common, label, 0.5, 50).loss.item()
        for a in (0.0, 0.5, 1.0, 2.0)
    ]
    assert costs == sorted(costs, reverse=True)


def test_low_precision_goes_through_float32():
    half = [torch.randn(2, k, 8, dtype=torch.bfloat16) for k in (3, 4)]
    term = wpa_loss(half[0], torch.ones(2, 3).bool(), half[1], torch.tensor([1, 0]), 0.5, 50)
    assert term.loss.dtype == torch.float32 and term.loss.isfinite()

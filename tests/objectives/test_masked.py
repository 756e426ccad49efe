"""MLM and MIM against loops over rows, positions and classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.objectives.distillation import distilled_cross_entropy
from simla_ray.objectives.masked_image import mim_loss
from simla_ray.objectives.masked_text import mlm_loss


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def reference(logits, label, weight, teacher, alpha, soft_log_p=None):
    """sum over chosen rows of (1 - alpha) hard + alpha soft, over max(count, 1)."""
    total, count = 0.0, 0
    for i in np.ndindex(label.shape):
        if not weight[i]:
            continue
        count += 1
        log_p = log_softmax(logits[i])
        hard, soft = -log_p[label[i]], 0.0
        if teacher is not None:
            q = np.exp(log_softmax(teacher[i]))
            soft = -(q * (log_p if soft_log_p is None else soft_log_p[i])).sum()
        total += (1 - alpha) * hard + alpha * soft if teacher is not None else hard
    return total / max(count, 1)


def test_hand_number():
    """Uniform over four classes: log 4 for any target, hard or soft."""
    logits, label, weight = torch.zeros(1, 2, 4), torch.tensor([[1, 3]]), torch.tensor([[1.0, 0.0]])
    teacher = torch.randn(1, 2, 4)
    for alpha in (0.0, 0.4, 1.0):
        term = distilled_cross_entropy(logits, label, weight, teacher, alpha)
        assert term.loss.item() == pytest.approx(math.log(4))
        assert term.metrics["targets"] == 1


def test_hand_number_of_the_mix():
    """p = (0.8, 0.2), true class 0, teacher (0.5, 0.5), alpha 0.25."""
    logits, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.zeros(1, 2)
    term = distilled_cross_entropy(logits, torch.tensor([0]), torch.ones(1), teacher, 0.25)
    hard, soft = -math.log(0.8), -0.5 * math.log(0.8) - 0.5 * math.log(0.2)
    assert term.loss.item() == pytest.approx(0.75 * hard + 0.25 * soft)
    assert term.metrics["hard"].item() == pytest.approx(hard)
    assert term.metrics["soft"].item() == pytest.approx(soft)
    assert term.metrics["accuracy"] == 1


@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_no_target_gives_zero_not_nan(shape):
    logits = torch.randn(*shape, 5, requires_grad=True)
    label, weight = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    term = distilled_cross_entropy(logits, label, weight, torch.randn(*shape, 5), 0.4)
    assert term.loss.item() == 0
    term.loss.backward()
    assert logits.grad is not None and (logits.grad == 0).all()
    assert all(value.isfinite() for value in term.metrics.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.booleans())
def test_mlm_equals_the_reference(seed, alpha, sequence, has_teacher):
    rng = np.random.default_rng(seed)
    B, L, M, V = 3, 6, 3, 7
    grid = rng.normal(size=(B, L, V)) * 3
    index = np.stack([rng.permutation(L)[:M] for _ in range(B)])
    logits = np.stack([grid[b, index[b]] for b in range(B)])
    label, weight = rng.integers(0, V, (B, M)), rng.integers(0, 2, (B, M)).astype(float)
    teacher = rng.normal(size=(B, M, V)) if has_teacher else None
    soft_log_p = None
    if sequence:  # log-softmax over the L positions, for each vocabulary entry on its own
        soft_log_p = np.zeros((B, M, V))
        for b in range(B):
            for m in range(M):
                for v in range(V):
                    soft_log_p[b, m, v] = log_softmax(grid[b, :, v])[index[b, m]]
    as_tensor = torch.from_numpy
    term = mlm_loss(
        as_tensor(logits), as_tensor(label), as_tensor(weight), as_tensor(teacher) if has_teacher else None, alpha,
        *((as_tensor(grid), as_tensor(index)) if sequence else ()),
    )  # fmt: skip
    expected = reference(logits, label, weight, teacher if alpha > 0 else None, alpha, soft_log_p)
    assert term.loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    hard = reference(logits, label, weight, None, 0.0)
    assert term.metrics["hard"].item() == pytest.approx(hard, rel=1e-10, abs=1e-12)


def test_the_sequence_axis_counts_padding_positions():
    """The official slip: a larger padding logit lowers log p of a masked word in the soft part, not in the hard one."""
    grid = torch.zeros(1, 4, 5)
    louder = grid.clone()
    louder[0, 3] = 5.0
    index, label, weight = torch.tensor([[1]]), torch.tensor([[2]]), torch.ones(1, 1)
    teacher = torch.zeros(1, 1, 5)

    def loss(g, alpha):
        return mlm_loss(g[:, 1:2], label, weight, teacher, alpha, g, index).loss.item()

    assert loss(grid, 1.0) == pytest.approx(math.log(4))  # over four positions, not five words
    assert loss(louder, 1.0) == pytest.approx(math.log(3 + math.exp(5)), rel=1e-6)
    assert loss(louder, 0.0) == pytest.approx(loss(grid, 0.0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.4]))
def test_mim_equals_the_reference(seed, alpha):
    """Images mask different numbers of patches; the mean is over all of them, not over images."""
    rng = np.random.default_rng(seed)
    C, P, M, K = 3, 9, 4, 6
    codes = rng.integers(0, K, (C, P))
    counts = rng.integers(0, M + 1, C)
    index, weight = np.zeros((C, M), dtype=np.int64), np.zeros((C, M))
    for c, n in enumerate(counts):
        index[c, :n], weight[c, :n] = rng.permutation(P)[:n], 1
    logits, teacher = rng.normal(size=(C, M, K)), rng.normal(size=(C, M, K))
    label = np.stack([codes[c, index[c]] for c in range(C)])
    term = mim_loss(*(torch.from_numpy(x) for x in (logits, codes, index, weight, teacher)), alpha)
    expected = reference(logits, label, weight, teacher if alpha > 0 else None, alpha)
    assert term.loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert term.metrics["targets"].item() == counts.sum()
    padding = torch.from_numpy(logits) + 100 * (1 - torch.from_numpy(weight))[:, :, None]
    again = mim_loss(padding, *(torch.from_numpy(x) for x in (codes, index, weight, teacher)), alpha)
    assert again.loss.item() == pytest.approx(term.loss.item(), rel=1e-12, abs=1e-12)


def test_the_teacher_gets_no_gradient_weight_at_alpha_zero():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    args = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    with_teacher = distilled_cross_entropy(logits, *args, torch.randn(2, 3, 4), 0.0)
    without = distilled_cross_entropy(logits, *args, None, 0.4)
    assert with_teacher.loss.item() == without.loss.item()
    assert "soft" not in with_teacher.metrics


def test_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(2, 3, 50, dtype=torch.bfloat16)
    args = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    term = distilled_cross_entropy(logits, *args, logits, 0.4)
    assert term.loss.dtype == torch.float32
    wide = distilled_cross_entropy(logits.float(), *args, logits.float(), 0.4)
    assert term.loss.item() == pytest.approx(wide.loss.item())

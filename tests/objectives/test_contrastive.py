"""ITC against a slow reference written from the formula: one row, one key, one direction at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.objectives.contrastive import itc_loss, similarities


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(v, t, vk, tk, temp, alpha, vq=None, tq=None, ids=None, queue_ids=None):
    """Mean of both directions of mean_b -sum_j y_j log softmax(s)_j; y = alpha softmax(s') + (1 - alpha) hard."""
    B, total = len(v), 0.0
    for query, teacher, keys, queue in ((v, vk, tk, tq), (t, tk, vk, vq)):
        everything = keys if queue is None else np.concatenate([keys, queue])
        for b in range(B):
            s = np.array([query[b] @ k / temp for k in everything])
            soft = softmax(np.array([teacher[b] @ k / temp for k in everything]))
            hard = np.zeros(len(everything))
            if ids is None:
                hard[b] = 1
            else:
                every_id = list(ids) + list(queue_ids if queue is not None else [])
                same = [j for j, other in enumerate(every_id) if other == ids[b]]
                hard[same] = 1 / len(same)
            y = alpha * soft + (1 - alpha) * hard
            total += -(y * np.log(softmax(s))).sum() / (2 * B)
    return total


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensors(*arrays):
    return [None if a is None else torch.from_numpy(np.asarray(a)) for a in arrays]


def test_hand_number_of_two_orthogonal_pairs():
    eye = torch.eye(2)
    term = itc_loss(eye, eye, eye, eye, torch.tensor(1.0))
    assert term.loss.item() == pytest.approx(math.log(1 + math.exp(-1)))  # 0.313262
    assert term.metrics["accuracy"] == 1
    sharp = itc_loss(eye, eye, eye, eye, torch.tensor(0.5))
    assert sharp.loss.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_hand_number_with_one_queued_key():
    """One pair, one queued key at cosine 0: -log(e / (e + 1)) on the text side only."""
    v = torch.tensor([[1.0, 0.0]])
    queue = torch.tensor([[0.0, 1.0]])
    both = itc_loss(v, v, v, v, torch.tensor(1.0), 0.0, queue, queue)
    assert both.loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    one = itc_loss(v, v, v, v, torch.tensor(1.0), 0.0, queue, -v)
    assert one.loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2)


def test_each_direction_reads_its_own_queue():
    """Images are compared with queued texts, texts with queued images."""
    v, t = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    image_queue, text_queue = torch.tensor([[0, 0, 1.0]]), torch.tensor([[1.0, 0, 0]])
    term = itc_loss(v, t, v, t, torch.tensor(1.0), 0.0, image_queue, text_queue)
    # image -> texts: own 0, queued 1; text -> images: own 0, queued 0
    assert term.loss.item() == pytest.approx((math.log(1 + math.e) + math.log(2)) / 2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([0, 3]), st.sampled_from([0.0, 0.4, 1.0]), st.booleans()
)
def test_equals_the_reference(seed, B, Q, alpha, positives):
    rng = np.random.default_rng(seed)
    v, t, vk, tk = (unit(rng, B, 6) for _ in range(4))
    vq, tq = (unit(rng, Q, 6), unit(rng, Q, 6)) if Q else (None, None)
    ids = rng.integers(0, 3, B) if positives else None
    queue_ids = rng.integers(-1, 3, Q) if positives and Q else None
    temp = float(rng.uniform(0.05, 0.5))
    term = itc_loss(
        *tensors(v, t, vk, tk),
        torch.tensor(temp, dtype=torch.float64),
        alpha,
        *tensors(vq, tq, ids, None if ids is None else np.concatenate([ids, [] if queue_ids is None else queue_ids])),
    )
    assert term.loss.item() == pytest.approx(reference(v, t, vk, tk, temp, alpha, vq, tq, ids, queue_ids), rel=1e-10)
    assert term.metrics["hard"].item() == pytest.approx(
        reference(v, t, vk, tk, temp, 0.0, vq, tq, ids, queue_ids), rel=1e-10
    )


def test_same_image_positives_share_the_target():
    """Hand number: cosines (1, 0.6) to two captions of one image at temperature 0.2 are logits (5, 3)."""
    v = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    t = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    log_p = -math.log(1 + math.exp(-2)), -2 - math.log(1 + math.exp(-2))
    shared = -(log_p[0] + log_p[1]) / 2  # both images: half of the target on each caption
    backward = math.log(2)  # both captions see two equal images
    term = itc_loss(v, t, v, t, torch.tensor(0.2), 0.0, image_id=torch.tensor([7, 7]), key_id=torch.tensor([7, 7]))
    assert term.loss.item() == pytest.approx((shared + backward) / 2)
    own = -(log_p[0] + log_p[1]) / 2  # diagonal: image 0 gets log_p[0], image 1 log_p[1]; the mean happens to agree
    assert itc_loss(v, t, v, t, torch.tensor(0.2)).loss.item() == pytest.approx((own + backward) / 2)
    queued = itc_loss(  # older keys of the same image take half of each target
        v[:1], t[:1], v[:1], t[:1], torch.tensor(1.0), 0.0, v[:1], torch.tensor([[0.0, 1.0]]), torch.tensor([7]),
        torch.tensor([7, 7]),
    )  # fmt: skip
    i2t = -(math.log(math.e / (math.e + 1)) + math.log(1 / (math.e + 1))) / 2
    assert queued.loss.item() == pytest.approx((i2t + math.log(2)) / 2)


def numeric_gradient(f, x, eps=1e-6):
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += eps
        down[i] -= eps
        grad[i] = (f(up) - f(down)) / (2 * eps)
    return grad


def test_without_a_teacher_the_gradient_reaches_both_sides():
    """Keys are the student's own vectors: the derivative counts them as queries and as keys."""
    rng = np.random.default_rng(0)
    v, t = unit(rng, 3, 4), unit(rng, 3, 4)
    temp = 0.2
    tv, tt = (torch.from_numpy(x).requires_grad_() for x in (v, t))
    itc_loss(tv, tt, tv, tt, torch.tensor(temp, dtype=torch.float64)).loss.backward()
    np.testing.assert_allclose(
        tv.grad, numeric_gradient(lambda x: reference(x, t, x, t, temp, 0.0), v), rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose(
        tt.grad, numeric_gradient(lambda x: reference(v, x, v, x, temp, 0.0), t), rtol=1e-6, atol=1e-8
    )


def test_gradients_reach_queries_and_temperature_and_nothing_of_the_soft_target():
    """The temperature's derivative goes through s only: the soft target counts as a constant."""
    rng = np.random.default_rng(1)
    v, t, vk, tk, vq, tq = (unit(rng, n, 4) for n in (3, 3, 3, 3, 5, 5))
    temp, alpha, eps = 0.3, 0.4, 1e-6
    q = [torch.from_numpy(x) for x in (v, t, vk, tk, vq, tq)]
    temperature = torch.tensor(temp, dtype=torch.float64, requires_grad=True)
    q[0].requires_grad_()
    term = itc_loss(q[0], q[1], q[2], q[3], temperature, alpha, q[4], q[5])
    term.loss.backward()

    def frozen_target(at):
        total = 0.0
        for query, teacher, keys in ((v, vk, np.concatenate([tk, tq])), (t, tk, np.concatenate([vk, vq]))):
            for b in range(3):
                y = alpha * softmax(teacher[b] @ keys.T / temp)
                y[b] += 1 - alpha
                total += -(y * np.log(softmax(query[b] @ keys.T / at))).sum() / 6
        return total

    expected = (frozen_target(temp + eps) - frozen_target(temp - eps)) / (2 * eps)
    assert temperature.grad.item() == pytest.approx(expected, rel=1e-6)
    assert np.allclose(
        q[0].grad, numeric_gradient(lambda x: reference(x, t, vk, tk, temp, alpha, vq, tq), v), rtol=1e-5, atol=1e-8
    )
    assert not term.metrics["hard"].requires_grad


def test_similarities_order_batch_then_queue():
    q, k, queue = torch.eye(2), 2 * torch.eye(2), 3 * torch.ones(1, 2)
    got = similarities(q, k, queue, torch.tensor(0.5))
    assert got.tolist() == [[4, 0, 6], [0, 4, 6]]


def test_logits_stay_float32_under_autocast():
    """At temperature 0.07 a bfloat16 cosine is off by up to 0.03 in the logit."""
    rng = np.random.default_rng(2)
    q, k = (torch.from_numpy(unit(rng, 8, 32)).float() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        logits = similarities(q, k, None, torch.tensor(0.07))
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, q @ k.T / 0.07, atol=1e-4)

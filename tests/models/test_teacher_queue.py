"""EMA teacher, queue and negatives of ITM."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from simla_ray.config.schema import Negatives, TeacherMode
from simla_ray.models.negatives import negative_indices
from simla_ray.models.queue import Queue
from simla_ray.models.teacher import Teacher


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_update_is_the_formula():
    student = small()
    teacher = Teacher(student, 0.9, TeacherMode.eval)
    expected = [p.detach().double().clone() for p in student.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        teacher.update(student)
        now = [p.detach().double() for p in student.parameters()]
        expected = [0.9 * e + 0.1 * s for e, s in zip(expected, now, strict=True)]
    for got, e in zip(teacher.master.parameters(), expected, strict=True):
        torch.testing.assert_close(got.double(), e, atol=1e-6, rtol=1e-6)
    assert teacher.towers is teacher.master
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_float32_master_does_not_stall():
    """At m = 0.995 a step of 0.005 * (1.1 - 1.0) is below bfloat16's spacing of 1 / 128 at 1."""
    student = nn.Linear(1, 1, bias=False)
    nn.init.ones_(student.weight)
    teacher = Teacher(student, 0.995, TeacherMode.eval, torch.bfloat16)
    naive = torch.ones(1, dtype=torch.bfloat16)
    nn.init.constant_(student.weight, 1.1)
    for _ in range(1000):
        teacher.update(student)
        naive.lerp_(torch.full((1,), 1.1, dtype=torch.bfloat16), 0.005)
    assert naive.item() == 1.0
    assert teacher.master.weight.item() == pytest.approx(1.1 - 0.1 * 0.995**1000, abs=1e-4)
    assert teacher.master.weight.dtype == torch.float32
    assert teacher.towers.weight.dtype == torch.bfloat16
    assert teacher.towers.weight.item() == torch.tensor(teacher.master.weight.item()).bfloat16().item()


def test_copy_from_and_refresh():
    student = small()
    teacher = Teacher(student, 0.9, TeacherMode.eval, torch.bfloat16)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    teacher.copy_from(student)
    for s, m, low in zip(student.parameters(), teacher.master.parameters(), teacher.low.parameters(), strict=True):
        assert torch.equal(s, m) and torch.equal(s.bfloat16(), low)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_teachers_dropout_follows_its_mode(mode):
    student = small().train()
    teacher = Teacher(student, 0.9, TeacherMode(mode))
    assert teacher.master[1].training == (mode == "train")
    owner = nn.ModuleDict({"student": student, "teacher": teacher})
    owner.train()
    assert teacher.master[1].training == (mode == "train")
    owner.eval()
    assert not teacher.master[1].training


def test_a_teacher_starts_as_a_copy_that_shares_nothing():
    student = small()
    teacher = Teacher(student, 0.9, TeacherMode.eval)
    before = teacher.master[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1)
    assert torch.equal(teacher.master[0].weight, before)


def test_queue_starts_with_unit_rows_and_unknown_ids():
    queue = Queue(8, 5)
    torch.testing.assert_close(queue.image.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(queue.text.norm(dim=1), torch.ones(8))
    assert not torch.equal(queue.image, queue.text)
    assert queue.ids.tolist() == [-1] * 8
    assert list(queue.parameters()) == [] and set(queue.state_dict()) == {"image", "text", "ids"}


def test_queue_writes_in_place_at_the_row_asked_for():
    queue = Queue(6, 2)
    before, storage = queue.image.clone(), queue.image.data_ptr()
    image, text = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    queue.write(image, text, torch.tensor([10, 11]), 4)
    assert torch.equal(queue.image[4:], image) and torch.equal(queue.text[4:], text)
    assert queue.ids.tolist() == [-1, -1, -1, -1, 10, 11]
    assert torch.equal(queue.image[:4], before[:4])
    assert queue.image.data_ptr() == storage


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_queue_keeps_the_old_row_where_either_side_is_not_finite(side, bad):
    queue = Queue(3, 2)
    before = {n: b.clone() for n, b in queue.named_buffers()}
    new = {"image": torch.ones(3, 2), "text": torch.ones(3, 2)}
    new[side][1, 0] = bad
    queue.write(new["image"], new["text"], torch.tensor([5, 6, 7]), 0)
    assert queue.ids.tolist() == [5, -1, 7]
    for name in ("image", "text"):
        assert torch.equal(getattr(queue, name)[1], before[name][1])
        assert (getattr(queue, name)[[0, 2]] == 1).all()


def test_queue_takes_bfloat16_keys():
    queue = Queue(2, 2)
    queue.write(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2), torch.tensor([1, 2]), 0)
    assert queue.image.dtype == torch.float32 and (queue.image == 1).all()


def draw(similarity, forbidden, how, eps=0.0, times=1):
    return np.stack([negative_indices(similarity, forbidden, how, eps).numpy() for _ in range(times)])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 7), st.sampled_from(list(Negatives)), st.sampled_from([0.0, 1e-4, 0.5]))
def test_negatives_are_never_own_nor_forbidden(seed, B, how, eps):
    torch.manual_seed(seed)
    similarity = torch.randn(B, B) * 20
    forbidden = torch.eye(B, dtype=torch.bool) | (torch.rand(B, B) < 0.4)
    for row in draw(similarity, forbidden, how, eps, 5):
        for b, j in enumerate(row):
            assert j != b
            assert not forbidden[b, j] or forbidden[b].all()


def test_a_row_that_forbids_everything_takes_any_other():
    B = 4
    forbidden = torch.ones(B, B, dtype=torch.bool)
    torch.manual_seed(0)
    got = draw(torch.randn(B, B), forbidden, Negatives.sample, 1e-4, 200)
    assert all(set(got[:, b]) == set(range(B)) - {b} for b in range(B))
    hard = draw(torch.randn(B, B), forbidden, Negatives.hard)
    assert all(hard[0, b] != b for b in range(B))


def test_eps_keeps_a_sharp_row_alive():
    """Own pair at cosine 1, temperature 0.001: every other probability underflows to zero."""
    similarity = 1000 * torch.eye(3)
    own = torch.eye(3, dtype=torch.bool)
    torch.manual_seed(0)
    for eps in (0.0, 1e-4):
        got = draw(similarity, own, Negatives.sample, eps, 200)
        assert all(set(got[:, b]) == set(range(3)) - {b} for b in range(3))


def test_non_finite_similarities_still_draw():
    similarity = torch.full((3, 3), math.nan)
    torch.manual_seed(0)
    got = draw(similarity, torch.eye(3, dtype=torch.bool), Negatives.sample, 1e-4, 20)
    assert (got != np.arange(3)).all()


def test_samples_follow_the_softmax():
    """Forbidden entries set to zero after softmax + eps, the rest renormalised by the draw."""
    similarity = torch.tensor([[5.0, 1.0, 0.0, 2.0]]).expand(4, 4)
    own = torch.eye(4, dtype=torch.bool)
    eps, times = 0.05, 4000
    torch.manual_seed(0)
    got = draw(similarity, own, Negatives.sample, eps, times)
    e = np.exp([5.0, 1.0, 0.0, 2.0])
    for b in range(4):
        weights = e / e.sum() + eps
        weights[b] = 0
        expected = weights / weights.sum()
        found = np.bincount(got[:, b], minlength=4) / times
        assert np.abs(found - expected).max() < 4 * math.sqrt(0.25 / times)


def test_hard_is_the_most_similar_and_random_ignores_similarity():
    similarity = torch.tensor([[9.0, 1.0, 2.0], [3.0, 9.0, 1.0], [1.0, 8.0, 9.0]])
    own = torch.eye(3, dtype=torch.bool)
    assert draw(similarity, own, Negatives.hard)[0].tolist() == [2, 0, 1]
    torch.manual_seed(0)
    got = draw(100 * similarity, own, Negatives.random, 0.0, 2000)
    assert abs((got[:, 0] == 1).mean() - 0.5) < 0.05

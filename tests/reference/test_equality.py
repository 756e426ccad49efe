"""Our step against the plain reference: losses and gradients in fp64, whole steps, options on and off."""

import pytest
import torch

from simla_ray.models.forward import Negatives
from simla_ray.models.model import Model
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step
from tests.models.toy import CLS, NAMES, SUBSETS, B, make_batch, make_model, make_run, run_forward
from tests.reference import Unfused, UnfusedStep

CPU = torch.device("cpu")
HARD = {"objectives__itm__negatives": "hard"}  # both take the same negatives, without a draw
NO_TEACHER = {"teacher": None, "objectives__psl__attention": "student"} | {
    f"objectives__{n}__soft_alpha": 0 for n in ("itc", "mlm", "mim", "psl")
}
subsets = pytest.mark.parametrize("on", SUBSETS, ids=["+".join(n for n in NAMES if n in s) for s in SUBSETS])


def lively(run, seed=0) -> Model:
    """fp64, every weight off its start, the teacher off the student: so that mix-ups show."""
    model = make_model(run, seed).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim:  # the temperature stays
                p.add_((0.05 if name.startswith("teacher.") else 0.2) * torch.randn_like(p))
    return model


def gradients(model, total):
    for p in model.parameters():
        p.grad = None
    total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, ours, theirs, rel=1e-10):
    """ours and theirs: (total, losses by name). Losses, and gradients against the tensor's or the whole norm."""
    assert set(ours[1]) == set(theirs[1])
    for name in ours[1]:
        assert ours[1][name].item() == pytest.approx(theirs[1][name].item(), rel=rel), name
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=rel)
    got, expected = gradients(model, ours[0]), gradients(model, theirs[0])
    assert set(got) == set(expected)
    whole = sum(g.square().sum() for g in expected.values()).sqrt().item()
    assert whole > 1e-3
    for name, grad in expected.items():
        scale = max(grad.norm().item(), 1e-3 * whole)
        assert (got[name] - grad).norm().item() <= rel * scale, name


def check(run, batch=None, *, active=None, alpha=0.4, columns=None, sdpa=False):
    model = lively(run)
    batch = make_batch() if batch is None else batch
    on = run.objectives.active()
    active, alphas = set(active or on), {n: min(alpha, getattr(o, "soft_alpha", 0.0)) for n, o in on.items()}
    total, terms, *keys = Losses(run, model, None, CLS, columns)(batch, active, alphas, 0.01)
    reference = Unfused(run, model, None, CLS, columns, sdpa=sdpa)
    theirs = reference.losses(batch, active, alphas, itm_eps=0.01)
    assert_equal(model, (total, {n: t.loss for n, t in terms.items()}), theirs)
    if {"itc", "itm"} & active:
        torch.testing.assert_close(keys, [reference.image_key, reference.text_key])


@subsets
def test_losses_and_gradients_equal_ours_for_every_subset(on):
    check(make_run(on, queue=16, **HARD))


@subsets
def test_and_without_a_teacher(on):
    check(make_run(on, **NO_TEACHER, **HARD))


@pytest.mark.parametrize("on", [s for s in SUBSETS if "mim" not in s], ids=lambda s: "+".join(sorted(s)))
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "no teacher"])
def test_and_with_fusion_in_the_upper_half(on, teacher):
    check(make_run(on, text__fusion="upper_half", **HARD, **({"queue": 16} if teacher else NO_TEACHER)))


def test_and_for_two_towers_alone():
    check(make_run(("itc",), method="clip", **NO_TEACHER))


CHANGES = {
    "official": {"variant": "official", "queue": 16},
    "sequence axis": {"objectives__mlm__soft_dim": "sequence"},
    "teacher's own words": {"objectives__mim__teacher_text": "teacher"},
    "words drawn again": {"objectives__mim__teacher_text": "student_redraw"},
    "student's attention": {"objectives__psl__attention": "student"},
    "teacher's image": {"objectives__psl__image_source": "teacher"},
    "student's words, teacher's image": {
        "objectives__psl__attention": "student", "objectives__psl__image_source": "teacher",
    },
    "chosen keywords": {"objectives__psl__select": "tfidf"},
    "hard recommendations": {"objectives__psl__recommend": "hard", "objectives__psl__recommend_top_k": 3},
    "thresholds": {"objectives__psl__recommend_threshold": 0.5, "objectives__psl__min_attention": 0.2},
    "no recommendations": {"objectives__psl__recommend": "off"},
    "no soft targets": {f"objectives__{n}__soft_alpha": 0 for n in ("itc", "mlm", "mim", "psl")},
    "weights": {f"objectives__{n}__weight": 0.3 * i + 0.2 for i, n in enumerate(NAMES)},
    "same image": {"objectives__itc__same_image": "positive", "queue": 16},
    "convolutional stem": {"vision__stem": "conv"},
}  # fmt: skip


@pytest.mark.parametrize("on", [NAMES, ("mlm", "mim", "psl")], ids=["all", "without pairs"])
@pytest.mark.parametrize("name", CHANGES)
def test_and_for_every_option(name, on):
    batch = make_batch()
    batch.image_id = torch.tensor([7, 7, 8, 9])
    check(make_run(on, **HARD, **CHANGES[name]), batch)


def test_and_with_fused_attention_phases_columns_or_an_alpha_of_zero():
    run = make_run(queue=16, **HARD)
    check(run, sdpa=True)
    check(make_run(objectives__psl__attention="student", **HARD), sdpa=True)
    check(run, alpha=0.0)
    check(run, columns=torch.arange(5, 25))
    for active in ({"itc"}, {"itm", "psl"}, {"mlm", "mim"}):
        check(run, active=active)


def test_and_for_batches_that_lack_something():
    run, batch = make_run(objectives__mim__batch_fraction=0.5, **HARD), make_batch()
    for name in ("patch_mask", "mim_index", "mim_weight", "codes"):
        setattr(batch, name, getattr(batch, name)[: B // 2])
    check(run, batch)
    batch = make_batch()
    for name in ("mlm_weight", "mim_weight", "patch_mask", "keyword_ok"):
        getattr(batch, name).zero_()
    check(make_run(**HARD), batch)
    batch = make_batch()
    batch.mlm_weight[1:, 1] = 0
    batch.mlm_index[1:, 1] = 0
    batch.keyword_ok[2] = False
    batch.image_id = torch.tensor([5, 5, 5, 5])  # no other image: any other row is a negative
    check(make_run(**HARD), batch)


def test_and_for_given_negatives():
    run, batch = make_run(queue=16), make_batch()
    model, given = lively(run), Negatives(torch.tensor([1, 2, 3, 1]), torch.tensor([3, 3, 0, 2]))
    _, terms = run_forward(model, run, batch, given=given)
    found = {n: t.loss for n, t in terms.items()}
    theirs = Unfused(run, model, None, CLS).losses(batch, set(NAMES), dict.fromkeys(NAMES, 0.4), given=given)
    assert_equal(model, (sum(found.values()), found), theirs)


STEPS = {
    "simla": (2, {"queue": 16, "optim__clip": 0.5, **HARD}),
    "albef": (2, {"on": ("itc", "itm", "mlm"), "method": "albef", "queue": 16, "optim__clip": None, **HARD}),
    "clip": (1, {"on": ("itc",), "method": "clip", **NO_TEACHER}),
}


@pytest.mark.parametrize(("micro", "changes"), STEPS.values(), ids=STEPS)
def test_three_steps_leave_the_same_weights_teacher_and_queue(micro, changes):
    run = make_run(**changes, batch__global=micro * B)
    rel = 1e-9 if run.optim.clip is None else 1e-6  # the fused optimiser takes its clipping factor in float32
    ours, theirs = lively(run), lively(run)
    step = Step(run, Losses(run, ours, None, CLS, None), 10, Comm(), CPU)
    reference = UnfusedStep(run, Unfused(run, theirs, None, CLS), 10, CPU)
    start = {n: t.clone() for n, t in ours.state_dict().items()}
    for number in range(3):
        batches = [(i, make_batch(10 * number + i)) for i in range(micro)]
        out, found = step(number, batches), reference(number, batches)
        assert found["grad_norm"] == pytest.approx(out.grad_norm.item(), rel=rel)
        assert set(found) == {"grad_norm", "total", *run.objectives.active()}
        for name in set(found) - {"grad_norm"}:
            assert found[name] == pytest.approx(out.sums[name].item() / micro, rel=rel), name
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=10 * rel, atol=rel, msg=name)
    moved = [n for n, t in theirs.state_dict().items() if not torch.equal(t, start[n])]
    assert len(moved) > 0.8 * len(start)

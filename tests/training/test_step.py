"""THE step on a toy model: what an update is, what a bad batch does, in which order things move."""

import copy
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step, active_at, alphas_at, step_seed
from tests.models.toy import CLS, NAMES, B, make_batch, make_model, make_run

CPU = torch.device("cpu")


def make_step(run, total=10, model=None, tokenizer=None):
    model = model if model is not None else make_model(run)
    return Step(run, Losses(run, model, tokenizer, CLS, None), total, Comm(), CPU)


def batches(*seeds):
    return [(number, make_batch(seed)) for number, seed in enumerate(seeds)]


def snapshot(step):
    """Everything that an update may change."""
    found = {f"model.{n}": t.clone() for n, t in step.model.state_dict().items()}
    for name, parameter in step.model.named_parameters():
        found |= {f"{name}.{n}": t.clone() for n, t in step.optimizer.state.get(parameter, {}).items()}
    return found


def watch_gradients(step, *, after=False):
    seen = {}

    def hook(optimizer, args, kwargs):
        seen.update({n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None})

    (step.optimizer.register_step_post_hook if after else step.optimizer.register_step_pre_hook)(hook)
    return seen


# --- which objectives, which seed -------------------------------------------------------------------------------------


def test_joint_runs_everything_that_is_on():
    run = make_run(("itc", "mim"), objectives__itm=None)
    assert all(active_at(run, s, 10) == {"itc", "mim"} for s in range(10))


def test_phases_change_at_their_fraction_of_the_run():
    phases = [{"until": 0.3, "objectives": ["itc", "psl"]}, {"until": 1.0, "objectives": ["itm", "mlm", "itc"]}]
    run = make_run(("itc", "itm", "mlm", "psl"), schedule__kind="phases", schedule__phases=phases)
    found = [active_at(run, s, 10) for s in range(12)]
    assert found[:3] == [{"itc", "psl"}] * 3
    assert found[3:] == [{"itc", "itm", "mlm"}] * 9  # also beyond the end, for a run that was shortened


def test_phases_leave_out_what_is_off():
    phases = [{"until": 1.0, "objectives": ["itc", "psl"]}]
    run = make_run(("itc", "mlm"), schedule__kind="phases", schedule__phases=phases)
    assert active_at(run, 0, 10) == {"itc"}


def test_sampled_draws_one_by_seed_and_step():
    run = make_run(schedule__kind="sampled", schedule__mix={"mlm": 3.0, "itm": 0.5})
    found = [active_at(run, s, 4000) for s in range(4000)]
    assert all(len(f) == 1 for f in found)
    assert found == [active_at(run, s, 4000) for s in range(4000)]
    count = Counter(next(iter(f)) for f in found)
    share = {"itc": 1, "itm": 0.5, "mlm": 3, "mim": 1, "psl": 1}
    for name, weight in share.items():
        assert count[name] / 4000 == pytest.approx(weight / 6.5, abs=0.03)
    other = make_run(schedule__kind="sampled", schedule__mix={"mlm": 3.0, "itm": 0.5}, seed=1)
    assert found != [active_at(other, s, 4000) for s in range(4000)]


def test_psl_waits_for_its_start_step():
    run = make_run(objectives__psl__start_step=4)
    assert [("psl" in active_at(run, s, 10)) for s in range(10)] == [False] * 4 + [True] * 6


def test_psl_waits_for_its_start_step_where_objectives_are_sampled():
    run = make_run(schedule__kind="sampled", objectives__psl__start_step=100)
    assert not any("psl" in active_at(run, s, 1000) for s in range(100))


def test_step_seeds_are_stable_and_apart():
    seeds = {(a, b, c): step_seed(a, b, c) for a in range(3) for b in range(20) for c in range(4)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds.values())
    assert step_seed(0, 0, 0) == int(np.random.SeedSequence([0, 3, 0, 0]).generate_state(1, np.uint64)[0] >> 1)
    assert step_seed(2, 19, 3) == seeds[2, 19, 3]


def test_alphas_ramp_per_objective():
    run = make_run(objectives__mlm__soft_alpha=0.2, objectives__mlm__alpha_ramp=0.5, objectives__itc__alpha_ramp=0)
    assert alphas_at(run, 0.25) == pytest.approx({"itc": 0.4, "mlm": 0.1, "mim": 0.4, "psl": 0.4})
    assert set(alphas_at(make_run(("itm", "mim")), 0.5)) == {"mim"}


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [NAMES, ("itc", "itm")])
def test_two_micro_batches_are_the_mean_of_their_gradients(on):
    run = make_run(on, optim__clip=None, queue=16)
    model = make_model(run)
    alone = copy.deepcopy(model)
    step = make_step(run, model=model)
    seen = watch_gradients(step)
    out = step(3, batches(1, 2))

    alone.teacher.update(alone.student)
    losses = Losses(run, alone, None, CLS, None)
    mean, sums = Counter(), Counter()
    for number, batch in batches(1, 2):
        torch.manual_seed(step_seed(run.seed, 3, number))
        total, terms, _, _ = losses(batch, set(on), alphas_at(run, 0.3), run.objectives.itm.eps * (0.02 / 0.5) ** 0.3)
        named = [(n, p) for n, p in alone.named_parameters() if not n.startswith("teacher.")]
        grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        for (name, _), grad in zip(named, grads, strict=True):
            if grad is not None:
                mean[name] = mean[name] + grad / 2
        sums["total"] += total.item()
        for name, term in terms.items():
            sums[name] += term.loss.item()
    assert set(seen) == set(mean)
    for name, grad in seen.items():
        torch.testing.assert_close(grad, mean[name], atol=1e-6, rtol=1e-4, msg=name)
    for name, value in sums.items():
        assert out.sums[name].item() == pytest.approx(value, rel=1e-5)
    assert out.grad_norm.item() == pytest.approx(sum(g.square().sum().item() for g in mean.values()) ** 0.5, rel=1e-4)
    assert out.grad_norm.isfinite()


def test_the_total_weighs_the_objectives():
    run = make_run(("itc", "mlm"), objectives__itc__weight=2.0, objectives__mlm__weight=0.5)
    out = make_step(run)(0, batches(0))
    expected = 2 * out.sums["itc"] + 0.5 * out.sums["mlm"]
    assert out.sums["total"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_order_of_a_worker_does_not_change_a_draw():
    """Draws belong to the number of the micro-batch, not to who computes it or when."""
    run = make_run(text__dropout=0.3, optim__clip=None, schedule__kind="joint")
    grads = []
    for order in ([0, 1], [1, 0]):
        step = make_step(run)
        seen = watch_gradients(step)
        both = batches(1, 2)
        step(0, [both[i] for i in order])
        grads.append(dict(seen))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_clipping_bounds_the_global_norm():
    seen = {}
    for clip in (None, 1e-2):
        step = make_step(make_run(optim__clip=clip))
        seen[clip] = watch_gradients(step, after=True)  # the optimiser clips
        out = step(0, batches(0))
        norm = sum(g.square().sum() for g in seen[clip].values()) ** 0.5
        assert norm.item() == pytest.approx(clip or out.grad_norm.item(), rel=1e-3)
        assert out.grad_norm > 0.1  # before clipping


def test_one_update_is_adamw_at_the_steps_learning_rate():
    """First AdamW step: -lr * factor * (sign-like g / (|g| + eps)), decay first."""
    run = make_run(
        ("itc",), optim__clip=None, optim__lr=0.1, optim__min_lr=0.01, optim__warmup_steps=4, optim__weight_decay=0.5,
        optim__temperature_lr_factor=0.02, optim__eps=1e-8,
    )  # fmt: skip
    step = make_step(run)
    seen = watch_gradients(step)
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    step(1, batches(0))
    lr = 0.01 + 0.09 * 2 / 4
    for name, decay, factor in (("student.vision_proj.weight", 0.5, 1.0), ("scale.temperature", 0.0, 0.02)):
        g = seen[name]
        expected = before[name] * (1 - lr * decay) - lr * factor * g / (g.abs() + 1e-8)
        torch.testing.assert_close(dict(step.model.named_parameters())[name].detach(), expected, atol=1e-6, rtol=1e-4)


def poison(batch, kind):
    if kind == "image":
        return dataclasses.replace(batch, image=torch.full(batch.image.shape, float("nan")))
    return dataclasses.replace(batch, mlm_weight=batch.mlm_weight * float("inf"))


@pytest.mark.parametrize("kind", ["image", "weight"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_batch_that_is_not_finite_changes_no_weight(kind, clip):
    run = make_run(optim__clip=clip, queue=16)
    step = make_step(run)
    assert step(0, batches(0, 1)).grad_norm.isfinite()
    step.model.teacher.m = 1.0  # the teacher moves before the forward, in a bad step as in a good one
    before = snapshot(step)
    good, bad = batches(2, 3)
    out = step(1, [good, (1, poison(bad[1], kind))])
    assert not out.grad_norm.isfinite()
    after = snapshot(step)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if not name.startswith("model.queue."):
            assert torch.equal(value, after[name]), name
    assert all(p.grad is None for p in step.model.parameters())
    assert all(b.isfinite().all() for b in step.model.queue.buffers())
    out = step(2, batches(4, 5))
    assert out.grad_norm.isfinite()
    assert any(not torch.equal(v, before[n]) for n, v in snapshot(step).items() if n.startswith("model.student."))


def test_a_run_that_starts_with_a_bad_batch_recovers():
    step = make_step(make_run())
    fresh = {n: p.detach().clone() for n, p in step.model.student.named_parameters()}
    assert not step(0, [(0, poison(make_batch(0), "image"))]).grad_norm.isfinite()
    assert all(torch.equal(p, fresh[n]) for n, p in step.model.student.named_parameters())
    assert all(float(s["step"]) == 0 for s in step.optimizer.state.values())
    assert step(1, batches(1)).grad_norm.isfinite()
    assert all(p.isfinite().all() for p in step.model.parameters())


def test_a_good_step_after_a_bad_one_is_as_if_there_had_been_none():
    run = make_run(("itc", "mlm"), teacher__m=1.0, optim__clip=None)
    ends = []
    for bad in (False, True):
        step = make_step(run)
        step(0, batches(0))
        if bad:
            step(5, [(0, poison(make_batch(9), "image"))])
        step(1, batches(1))
        ends.append({n: p.detach().clone() for n, p in step.model.student.named_parameters()})
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


# --- teacher, temperature, queue --------------------------------------------------------------------------------------


def test_the_teacher_moves_once_per_step_and_before_the_forward():
    run = make_run(teacher__m=0.9)
    step = make_step(run)
    step(0, batches(0))
    master = {n: p.detach().clone() for n, p in step.model.teacher.master.named_parameters()}
    student = {n: p.detach().clone() for n, p in step.model.student.named_parameters()}
    events = []
    moved = step.model.teacher.update

    def update(of):
        events.append("teacher")
        moved(of)

    step.model.teacher.update = update
    step.model.teacher.towers.vision.register_forward_pre_hook(lambda *_: events.append("forward"))
    step.model.student.vision.register_forward_pre_hook(lambda *_: events.append("forward"))
    step.optimizer.register_step_pre_hook(lambda *_: events.append("update"))
    step(1, batches(1, 2))
    assert events == ["teacher", *["forward"] * 4, "update"]
    for name, p in step.model.teacher.master.named_parameters():
        torch.testing.assert_close(p.detach(), 0.9 * master[name] + 0.1 * student[name], atol=1e-7, rtol=1e-5)


def test_the_temperature_is_clamped_before_the_forward():
    step = make_step(make_run(("itc",)))
    for value, expected in ((3.0, 0.5), (-2.0, 0.001)):
        with torch.no_grad():
            step.model.scale.temperature.fill_(value)
        out = step(0, batches(0))
        assert out.sums["itc/temperature"].item() == pytest.approx(expected)


def test_the_queue_takes_micro_batches_in_order():
    run = make_run(queue=4 * B, batch__global=2 * B)
    model = make_model(run)
    first = copy.deepcopy(model)
    step = make_step(run, model=model)
    before = model.queue.image.clone()
    step(1, batches(1, 2))  # rows 2B .. 4B - 1
    assert torch.equal(model.queue.image[: 2 * B], before[: 2 * B])
    assert model.queue.ids[2 * B :].tolist() == [100, 101, 102, 103, 200, 201, 202, 203]
    with torch.no_grad():
        for i, seed in enumerate((1, 2)):
            keys = first.teacher.towers
            batch = make_batch(seed)
            rows = slice((2 + i) * B, (3 + i) * B)
            torch.testing.assert_close(model.queue.image[rows], keys.image_vector(keys.vision(batch.image)))
            text = keys.text_vector(keys.text.encode(batch.token_ids, batch.token_mask))
            torch.testing.assert_close(model.queue.text[rows], text, atol=1e-5, rtol=1e-5)
    step(2, batches(3, 4))  # once round
    assert model.queue.ids[: 2 * B].tolist() == [300, 301, 302, 303, 400, 401, 402, 403]


def test_both_micro_batches_see_the_same_queue():
    """Keys enter after the update: the second micro-batch does not meet the first one's."""
    run = make_run(("itc",), queue=4 * B)
    single = make_run(("itc",), queue=4 * B, batch__global=B)
    second = make_batch(2)
    together = make_step(run)(0, [(0, make_batch(1)), (1, second)]).sums["itc"]
    apart = make_step(single)(0, [(1, second)]).sums["itc"]
    first = make_step(single)(0, [(0, make_batch(1))]).sums["itc"]
    assert together.item() == pytest.approx(apart.item() + first.item(), rel=1e-5)


class TwoWorkers(Comm):
    """Rank 0 of two whose other rank holds the given keys."""

    def __init__(self, others):
        super().__init__()
        self.others = others

    def cat(self, value, n):
        return [value, self.others.pop(0)]


@pytest.mark.parametrize("micros", [4, 3])
def test_keys_of_several_workers_are_interleaved(micros):
    """Worker r holds the micro-batches r, r + W, ...: the queue gets 0, 1, 2, 3, not 0, 2, 1, 3."""
    run = make_run(("itc",), queue=micros * B, batch__global=micros * B)
    step = make_step(run)

    def keys(number):
        return torch.full((B, 8), float(number)), torch.full((B, 8), -float(number)), torch.full((B,), number)

    theirs = [keys(i) for i in range(1, micros, 2)]
    step.comm = TwoWorkers([torch.stack([k[i] for k in theirs]) for i in range(3)])
    step.comm.world = 2
    step._write_queue(0, [keys(i) for i in range(0, micros, 2)])
    order = torch.arange(micros).repeat_interleave(B)
    assert torch.equal(step.model.queue.ids, order)
    assert torch.equal(step.model.queue.image[:, 0], order.float())
    assert torch.equal(step.model.queue.text[:, 0], -order.float())


# --- phases and the rest ----------------------------------------------------------------------------------------------


def test_a_phase_leaves_other_parameters_alone():
    phases = [{"until": 0.5, "objectives": ["itc"]}, {"until": 1.0, "objectives": list(NAMES)}]
    run = make_run(schedule__kind="phases", schedule__phases=phases, optim__weight_decay=0.5)
    step = make_step(run)
    before = {n: p.detach().clone() for n, p in step.model.student.named_parameters()}
    step(0, batches(0))
    after = dict(step.model.student.named_parameters())
    for name in ("mim_head.weight", "concept_head.weight", "text.cls.predictions.bias", "vision.mask_token"):
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["vision_proj.weight"], before["vision_proj.weight"])
    out = step(5, batches(1))
    assert set(NAMES) <= set(out.sums)
    assert not torch.equal(after["mim_head.weight"], before["mim_head.weight"])


def test_sampled_steps_train_one_objective_at_a_time():
    run = make_run(schedule__kind="sampled")
    step = make_step(run, total=30)
    seen = set()
    for s in range(30):
        out = step(s, batches(s))
        names = {n for n in out.sums if n in NAMES}
        assert names == active_at(run, s, 30)
        seen |= names
    assert seen == set(NAMES)


def test_codes_come_from_the_tokenizer_where_none_are_given():
    class Tokenizer(torch.nn.Module):
        def forward(self, image):
            self.seen = image
            return torch.zeros(len(image), 9, dtype=torch.long)

    run, tokenizer = make_run(("mim",)), Tokenizer()
    step = make_step(run, tokenizer=tokenizer)
    batch = dataclasses.replace(make_batch(), codes=None)
    step(0, [(0, batch)])
    assert torch.equal(tokenizer.seen, batch.image)
    second = torch.randint(0, 256, (B, 3, 24, 24), dtype=torch.uint8)
    step(0, [(0, dataclasses.replace(batch, code_image=second))])
    assert torch.equal(tokenizer.seen, second)


def test_the_same_step_twice_gives_the_same_weights():
    run = make_run(text__dropout=0.2, queue=16)
    ends = []
    for _ in range(2):
        step = make_step(run)
        torch.manual_seed(len(ends))  # what the process drew before does not matter
        step(0, batches(0, 1))
        ends.append(snapshot(step))
    assert all(torch.equal(v, ends[1][n]) for n, v in ends[0].items())


class Syncs(TorchDispatchMode):
    """Collects operators that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in {"_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select"}:
            self.found.append(str(func))
        if func.overloadpacket.__name__ == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.found.append("index with a boolean mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["default", "official"])
def test_the_step_never_reads_a_value_back(variant):
    step = make_step(make_run(variant=variant, queue=16))
    step(0, batches(0, 1))
    with Syncs() as syncs:
        step(1, batches(2, 3))
    assert syncs.found == []

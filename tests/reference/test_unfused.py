"""The plain reference alone: recorded numbers, the official cost, and what it must not save."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from simla_ray.config.load import load_run
from simla_ray.config.schema import Itm
from simla_ray.models.forward import Negatives
from simla_ray.models.model import Model
from simla_ray.models.official import from_official_name
from simla_ray.types import Batch
from tests.golden import test_albef
from tests.golden import test_simla as golden
from tests.models.toy import CLS, NAMES, B, make_batch, make_model, make_run
from tests.reference import Unfused, UnfusedStep, losses
from tests.reference.step import clamp_temperature, move_teacher

CPU = torch.device("cpu")
ALPHAS = dict.fromkeys(NAMES, 0.4)


class Calls(TorchDispatchMode):
    """Every operation below it with the shape of what it gave."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shape = tuple(out.shape) if isinstance(out, Tensor) else None
        self.seen.append((func.overloadpacket.__name__, shape))
        return out

    def count(self, name, shape=None):
        return sum(n == name and shape in (None, s) for n, s in self.seen)


# --- recorded numbers of the official code ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(golden.SETS))
@pytest.mark.parametrize("sdpa", [False, True], ids=["written", "sdpa"])
def test_the_reference_alone_reproduces_the_official_step(name, sdpa, monkeypatch):
    folder = golden.SETS[name]
    meta, run, model = golden.build(folder, torch.float64)
    inputs, values = load_file(folder / "step0_inputs.safetensors"), load_file(folder / "step0_values.safetensors")
    batch = golden.make_batch(inputs, torch.float64)
    select = losses.select_keywords

    def recorded_where_tied(*args):
        chosen = select(*args)
        tied = torch.tensor(meta["steps"][0]["psl_keyword_tie"])
        picks = torch.zeros_like(chosen).scatter_(1, values["psl_top5_positions"].long(), True)
        return torch.where(tied[:, None], picks, chosen)

    monkeypatch.setattr(losses, "select_keywords", recorded_where_tied)
    clamp_temperature(model)
    move_teacher(model.teacher.master, model.student, run.teacher.m)
    given = Negatives(inputs["neg_image_idx_for_text"].long(), inputs["neg_text_idx_for_image"].long())
    reference = Unfused(run, model, None, golden.CLS, sdpa=sdpa)
    alphas = dict.fromkeys(NAMES, float(inputs["alpha"]))
    total, found = reference.losses(batch, set(NAMES), alphas, given=given)
    for ours, theirs in {"itc": "ita", "itm": "itm", "mlm": "mlm", "mim": "mim", "psl": "psl"}.items():
        golden.close(ours, found[ours], values[f"loss_{theirs}"], 1e-9)
    golden.close("total", total, values["loss_total"], 1e-9)
    golden.close("image keys", reference.image_key, values["image_feat_m"], 1e-9)
    golden.close("text keys", reference.text_key, values["text_feat_m"], 1e-9)
    total.backward()
    golden.compare_gradients(0, meta, model, values, 1e-9)


@pytest.mark.parametrize("sdpa", [False, True], ids=["written", "sdpa"])
def test_the_reference_alone_reproduces_the_official_albef_step(sdpa):
    if not test_albef.SETS:
        pytest.skip("no golden set of ALBEF")
    folder = next(iter(test_albef.SETS.values()))
    _, run, model, _ = test_albef.build(folder, torch.float64)
    move_teacher(model.teacher.master, model.student, run.teacher.m)
    inputs, values = (load_file(folder / f"step0_{name}.safetensors") for name in ("inputs", "values"))
    masked = torch.zeros(4, 9)  # there are no masked images
    batch = golden.make_batch(inputs | {"masked_visual_token_pos": masked, "visual_token_ids": masked}, torch.float64)
    given = Negatives(inputs["neg_image_idx_for_text"].long(), inputs["neg_text_idx_for_image"].long())
    alphas = dict.fromkeys(("itc", "mlm"), float(inputs["alpha"]))
    total, found = Unfused(run, model, None, golden.CLS, sdpa=sdpa).losses(
        batch, {"itc", "itm", "mlm"}, alphas, given=given
    )
    for ours, theirs in {"itc": "ita", "itm": "itm", "mlm": "mlm"}.items():
        golden.close(ours, found[ours], values[f"loss_{theirs}"], 1e-9)
    total.backward()
    parameters = dict(model.named_parameters())
    whole = values["grad_stats"][:, 0].norm().item()
    for name in (n.removeprefix("grad.") for n in values if n.startswith("grad.")):
        expected, ours = values[f"grad.{name}"], from_official_name(name)
        if ours is not None:  # token types are part of the positions
            scale = max(expected.norm().item(), 1e-3 * whole)
            assert (parameters[ours[0]].grad - expected).norm().item() <= 1e-9 * scale, name


# --- cost -------------------------------------------------------------------------------------------------------------


def meta_batch(rows: int, length: int, patches: int) -> Batch:
    """Shapes without values."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def flags(*shape):
        return empty(*shape, dtype=torch.bool)

    return Batch(
        image=empty(rows, 3, 256, 256, dtype=torch.float32),
        token_ids=empty(rows, length),
        token_mask=flags(rows, length),
        masked_ids=empty(rows, length),
        mlm_index=empty(rows, 4),
        mlm_weight=empty(rows, 4, dtype=torch.float32),
        mlm_label=empty(rows, 4),
        patch_mask=flags(rows, patches),
        mim_index=empty(rows, 75),
        mim_weight=empty(rows, 75, dtype=torch.float32),
        word_start=empty(rows, length),
        keyword_ok=flags(rows, length),
        keyword_prior=empty(rows, length, dtype=torch.float32),
        image_id=empty(rows),
        codes=empty(rows, patches),
    )


@pytest.mark.parametrize(("method", "gigaflops"), [("simla", 798.4), ("albef", 288.9)])
def test_cost_per_pair_is_the_official_one(method, gigaflops, monkeypatch):
    """At full size, counted from shapes. The count of the official step takes three times the forward for every layer;
    the patch embedding has no gradient of its input, so ours is a little below."""
    shape = {"size": "base", "vision.pretrained": False, "batch.micro": 2, "batch.global": 2, "ray.workers": 1}
    run = load_run(overrides={"method": method, **shape})
    with torch.device("meta"):
        model = Model(run, 30522)
    # What is picked follows from values, which there are none of; all rows stay instead. No product reads them.
    monkeypatch.setattr(losses, "pick", lambda x, chosen: x.flatten(0, 1))
    given = Negatives(torch.tensor([1, 0]), torch.tensor([1, 0]))
    with FlopCounterMode(display=False) as counter:
        total, _ = Unfused(run, model, None, CLS).losses(
            meta_batch(2, 25, 256), set(run.objectives.active()), ALPHAS, given=given
        )
        total.backward()
    assert counter.get_total_flops() / 2e9 == pytest.approx(gigaflops, rel=0.01)
    if method == "simla":
        with Calls() as calls:
            move_teacher(model.teacher.master, model.student, 0.995)
        assert (calls.count("mul"), calls.count("add")) == (2 * 480, 480)


def test_the_queue_is_copied_four_times_per_step_and_written_after():
    run = make_run(("itc",), queue=64, batch__global=B)
    model = make_model(run)
    step = UnfusedStep(run, Unfused(run, model, None, CLS), 10, CPU)
    before = model.queue.image.clone()
    with Calls() as calls:
        step(1, [(0, make_batch())])
    size = (64, run.joint_width)
    assert calls.count("clone", size) == 2  # one per modality
    assert calls.count("cat", (B + 64, run.joint_width)) == 2
    changed = (model.queue.image != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == [4, 5, 6, 7]


def test_the_teacher_moves_by_three_operations_per_parameter_into_new_tensors():
    model = make_model(make_run())
    teacher, student = model.teacher.master, model.student
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    n = len(list(teacher.parameters()))
    before = {
        name: (p.data_ptr(), 0.9 * p + 0.1 * s)
        for (name, p), s in zip(teacher.named_parameters(), student.parameters(), strict=True)
    }
    kept = [p.data for p in teacher.parameters()]  # so that no address is used again
    with Calls() as calls:
        move_teacher(teacher, student, 0.9)
    counts = Counter(name for name, _ in calls.seen)
    assert (counts["mul"], counts["add"], len(kept)) == (2 * n, n, n)
    assert not {"lerp_", "mul_", "add_", "_foreach_lerp_"} & set(counts)
    for name, p in teacher.named_parameters():
        pointer, expected = before[name]
        assert p.data_ptr() != pointer
        torch.testing.assert_close(p, expected)


def test_the_host_waits_for_every_draw_and_every_gradient():
    run = make_run(objectives__itm__negatives="sample")
    step = UnfusedStep(run, Unfused(run, make_model(run), None, CLS), 10, CPU)
    with Calls() as calls:
        total, _ = step.unfused.losses(make_batch(), set(NAMES), ALPHAS)
    assert calls.count("multinomial") == 2 * B and calls.count("_local_scalar_dense") == 2 * B
    total.backward()
    reached = sum(p.grad is not None for p in step.parameters)
    step.optimizer.step = lambda: None
    with Calls() as calls:
        step._update()
    assert calls.count("_local_scalar_dense") == reached == len(step.parameters)


# --- draws, dropout, number formats -----------------------------------------------------------------------------------


def test_drawn_negatives_follow_the_weights_and_leave_out_the_forbidden():
    batch = make_batch()
    batch.image_id = torch.tensor([1, 1, 2, 3])
    forbidden = losses.forbidden_pairs(batch, Itm())
    similarity = torch.zeros(B, B)
    similarity[2, 3] = similarity[3, 3] = 50.0
    drawn = [losses.draw_negatives(similarity, forbidden, Itm(eps=0.0), 0.0) for _ in range(40)]
    assert {row[2] for row in drawn} == {3} and {row[0] for row in drawn} == {2, 3} == {row[1] for row in drawn}
    with pytest.raises(RuntimeError):  # the own pair takes all the weight: nothing is left, as in the official code
        losses.draw_negatives(1e4 * torch.eye(B), forbidden, Itm(), 0.0)


def test_dropout_is_drawn_in_the_student_and_with_the_teachers_mode():
    run = make_run(text__dropout=0.3)
    official = make_run(text__dropout=0.3, teacher__mode="train")
    for r, differs in ((run, False), (official, True)):
        model = make_model(r)
        reference = Unfused(r, model, None, CLS)
        first, second = (reference.losses(make_batch(), {"itc"}, ALPHAS) for _ in range(2))
        assert first[0].item() != second[0].item()
        keys = []
        for _ in range(2):
            reference.losses(make_batch(), {"itc"}, ALPHAS)
            keys.append(reference.text_key)
        assert torch.equal(*keys) != differs


@pytest.mark.parametrize("sdpa", [False, True], ids=["written", "sdpa"])
def test_a_step_under_autocast_stays_near_the_exact_one(sdpa):
    run = make_run(queue=16, batch__global=B, objectives__itm__negatives="hard")
    out = []
    for autocast in (False, True):
        unfused = Unfused(run, make_model(run), None, CLS, sdpa=sdpa)
        out.append(UnfusedStep(run, unfused, 10, CPU, autocast)(5, [(0, make_batch())]))
    assert out[1] == pytest.approx(out[0], rel=0.05)

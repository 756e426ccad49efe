"""Undoing a saving changes what is computed, never what comes out."""

from contextlib import nullcontext

import pytest
import torch

from simla_ray.models.model import Model
from simla_ray.training import measure
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step
from tests.models.toy import CLS, VOCAB, B, make_batch, make_run
from tests.reference.test_equality import HARD, lively
from tests.reference.test_unfused import Calls
from tests.reference.without import SAVINGS

CPU = torch.device("cpu")
BY_NAME = {saving.undone.__name__: saving for saving in SAVINGS}
IN_PASSES = (
    "last_layer_rows",
    "shared_image_kv",
    "one_call",
    "one_lookup",
    "sdpa",
    "bucketed_lengths",
    "queue_in_place",
)
IN_FLOAT32 = [name for name in BY_NAME if name != "low_copy"]  # which autocast alone makes


def toy_run(**changes):
    return make_run(**{"queue": 16, "text__max_tokens": 12, "batch__global": B, **HARD, **changes})


def step_of(run) -> Step:
    return Step(run, Losses(run, lively(run), None, CLS, None).train(), 10, Comm(), CPU)


def trained(run, around, steps=3):
    """Scalars of some steps, and the state after them."""
    step = step_of(run)
    with around:
        outs = [step(number, [(0, make_batch(number))]) for number in range(steps)]
    found = [{n: v.item() for n, v in out.sums.items()} | {"norm": out.grad_norm.item()} for out in outs]
    return found, step.model.state_dict()


def operations(run, around) -> Calls:
    """Operations of the second step."""
    step = step_of(run)
    with around:
        step(0, [(0, make_batch(0))])
        with Calls() as calls:
            step(1, [(0, make_batch(1))])
    return calls


def flops(run, around) -> int:
    with torch.device("meta"):
        model = Model(run, VOCAB)
    on, batch = run.objectives.active(), make_batch().to(torch.device("meta"))
    losses = Losses(run, model, None, CLS, None).train()
    with around:
        return measure.flops(lambda: losses(batch, set(on), dict.fromkeys(on, 0.4), 0.01)[0])


@pytest.fixture(scope="module")
def plain():
    run = toy_run()
    return trained(run, nullcontext()), operations(run, nullcontext()), flops(run, nullcontext())


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_steps_without_a_saving_come_out_the_same(name, plain):
    (found, state), _, _ = plain
    theirs, after = trained(toy_run(), BY_NAME[name].undone())
    for ours, other in zip(found, theirs, strict=True):
        assert other == pytest.approx(ours, rel=1e-6)
    for key, tensor in state.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("keywords", [{}, {"objectives__psl__attention": "student"}], ids=["teacher", "student"])
@pytest.mark.parametrize("name", ["last_layer_rows", "shared_image_kv", "one_call", "one_lookup"])
def test_and_with_other_reads_of_the_passes(name, keywords):
    for changes in (keywords, {"on": ("itc", "itm")}, {"on": ("mlm", "psl"), **keywords}):
        run = toy_run(**changes)
        ours, theirs = trained(run, nullcontext(), 1), trained(run, BY_NAME[name].undone(), 1)
        assert theirs[0] == [pytest.approx(row, rel=1e-6) for row in ours[0]]


@pytest.mark.parametrize("name", IN_PASSES)
def test_flops_are_more_without_those_that_count_and_else_the_same(name, plain):
    *_, ours = plain
    theirs = flops(toy_run(), BY_NAME[name].undone())
    assert theirs > 1.01 * ours if BY_NAME[name].counts else theirs == ours


def test_the_copy_of_the_teacher_is_left_alone_under_bf16():
    run, found = toy_run(precision="bf16"), {}
    for name, around in (("ours", nullcontext()), ("theirs", BY_NAME["low_copy"].undone())):
        torch.manual_seed(0)
        step = Step(run, Losses(run, Model(run, VOCAB, torch.bfloat16), None, CLS, None).train(), 10, Comm(), CPU)
        with around, Calls() as calls:
            out = step(5, [(0, make_batch())])
        found[name] = out.sums["total"].item(), calls.count("_to_copy"), calls.count("_foreach_copy_")
    (ours, casts, copies), (theirs, more_casts, none) = found["ours"], found["theirs"]
    assert theirs == pytest.approx(ours, rel=0.02)
    assert more_casts > casts + 20 and (copies, none) == (1, 0)


# --- each really does without its saving ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_what_is_executed_changes(name, plain):
    drops = name in ("cheap_masks", "teacher_dropout")
    run = toy_run(text__dropout=0.1 if drops else 0.0)
    ours = operations(run, nullcontext()) if drops else plain[1]
    CHANGED[name](ours, operations(run, BY_NAME[name].undone()))


def test_the_teacher_drops_out_only_inside():
    step = step_of(toy_run())
    with BY_NAME["teacher_dropout"].undone():
        step(0, [(0, make_batch())])
    assert not any(m.training for m in step.model.teacher.towers.modules())


def products(calls):
    return sum(calls.count(name) for name in ("mm", "addmm", "bmm"))


def _last_layer(ours, theirs):
    assert theirs.count("addmm", (B * 7, VOCAB)) > ours.count("addmm", (B * 7, VOCAB)) == 0
    assert theirs.count("addmm", (B * 10, 12)) == 2 and ours.count("addmm", (B * 10, 12)) == 0  # codes of all tokens


def _image_kv(ours, theirs):
    rows = 4 * B * 10  # four groups of queries over ten image tokens
    assert theirs.count("addmm", (rows, 16)) >= 2 and ours.count("addmm", (rows, 16)) == 0


def _one_call(ours, theirs):
    convolutions = [calls.count("convolution") for calls in (ours, theirs)]
    assert convolutions == [2, 4]
    assert products(theirs) > products(ours)


def _lookup(ours, theirs):
    gradient = "embedding_dense_backward"
    assert (ours.count(gradient), theirs.count(gradient)) == (0, 2)


def _sdpa(ours, theirs):
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert ours.count(fused) > 10 and theirs.count(fused) == 0
    assert theirs.count("_softmax") > ours.count("_softmax") + 10


def _lengths(ours, theirs):
    lengths = [{shape[1] for name, shape in calls.seen if name == "embedding"} for calls in (ours, theirs)]
    assert lengths == [{7}, {12}]


def _masks(ours, theirs):
    assert [calls.count("bernoulli_") > 0 for calls in (ours, theirs)] == [False, True]
    assert [calls.count("random_") > 0 for calls in (ours, theirs)] == [True, False]


def _teacher(ours, theirs):
    assert theirs.count("random_") > ours.count("random_") > 0


def _ema(ours, theirs):
    assert (ours.count("_foreach_lerp_"), theirs.count("_foreach_lerp_")) == (1, 0)
    assert theirs.count("mul") > ours.count("mul") + 100


def _queue(ours, theirs):
    assert (ours.count("clone", (16, 8)), theirs.count("clone", (16, 8))) == (0, 2)
    assert theirs.count("cat", (B + 16, 8)) == 2


def _adamw(ours, theirs):
    assert ours.count("_fused_adamw_") > 0 and theirs.count("_fused_adamw_") == 0
    assert theirs.count("addcdiv_") > 50


def _waiting(ours, theirs):
    waits = "_local_scalar_dense"
    assert theirs.count(waits) > ours.count(waits) + 100


CHANGED = {
    "last_layer_rows": _last_layer,
    "shared_image_kv": _image_kv,
    "one_call": _one_call,
    "one_lookup": _lookup,
    "sdpa": _sdpa,
    "bucketed_lengths": _lengths,
    "cheap_masks": _masks,
    "teacher_dropout": _teacher,
    "foreach_ema": _ema,
    "queue_in_place": _queue,
    "fused_adamw": _adamw,
    "no_waiting": _waiting,
}

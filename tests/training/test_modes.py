"""How a step is computed, not what: compiled, recomputed, in bfloat16, as another method, on another device's terms."""

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from simla_ray.config.load import load_run
from simla_ray.models.compiling import eager
from simla_ray.training import step as modes
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step
from tests.models.toy import CLS, NAMES, SHAPE, VOCAB, B, make_batch, make_model, make_run
from tests.training.test_step import CPU, Syncs, batches

METHODS = ("simla", "albef", "clip", "siglip", "vilt")


def method_run(method, **overrides):
    """A toy of a method's preset."""
    shape = {k: v for k, v in SHAPE.items() if not k.startswith(("objectives.", "schedule.", "teacher."))}
    shape |= {k.replace("__", "."): v for k, v in overrides.items()}
    return load_run(overrides={"method": method, **shape, "schedule.kind": "joint", "schedule.phases": []})


def losses_of(run, *, steps=3, dtype=torch.float32, lengths=(7, 7, 7)):
    """Loss and gradient norm of some steps on batches of these padded lengths."""
    step = Step(run, Losses(run, make_model(run).to(dtype), None, CLS, None), 10, Comm(), CPU)
    step.losses.train()
    found = []
    for s in range(steps):
        out = step(s, [(i, shorter(make_batch(2 * s + i), lengths[s])) for i in (0, 1)])
        found += [out.sums["total"].item(), out.grad_norm.item()]
    return found


def shorter(batch, length):
    """The batch with its texts cut to a padded length."""
    cut = {
        f.name: getattr(batch, f.name)[:, :length].contiguous()
        for f in dataclasses.fields(batch)
        if f.name in ("token_ids", "token_mask", "masked_ids", "word_start", "keyword_ok", "keyword_prior")
    }
    return dataclasses.replace(batch, **cut)


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_change_nothing(method):
    """The same arithmetic twice, with the same dropout: equal to the last bit."""
    plain = losses_of(method_run(method, text__dropout=0.2))
    assert losses_of(method_run(method, text__dropout=0.2, activation_checkpointing=True)) == plain


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_near_float32(method):
    """Passes in bfloat16, the rest in float32: 2 % on losses, 10 % on the norm of the first gradient."""
    plain = losses_of(method_run(method))
    low = losses_of(method_run(method, precision="bf16"))
    assert low[::2] == pytest.approx(plain[::2], rel=0.02) and low[1] == pytest.approx(plain[1], rel=0.1)
    assert low != plain


def programs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def compiled(monkeypatch):
    """Programs are traced and counted, and run without generated code, which takes minutes to build."""
    torch._dynamo.reset()
    counters.clear()
    compile_layers = modes.compile_layers
    monkeypatch.setattr(modes, "compile_layers", lambda model: compile_layers(model, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_give_the_same_losses_and_compile_once_per_length(method, compiled):
    run = method_run(method, compile=True)
    plain = losses_of(method_run(method), steps=4, lengths=(7, 6, 7, 6))
    assert losses_of(run, steps=2, lengths=(7, 6)) == pytest.approx(plain[:4], rel=1e-5)
    first = programs()
    assert first > 0 and not counters["graph_break"]
    assert losses_of(run, steps=4, lengths=(7, 6, 7, 6)) == pytest.approx(plain, rel=1e-5)
    assert programs() == first  # the lengths are known, whoever meets them


@pytest.mark.slow
def test_evaluation_compiles_nothing(compiled):
    run = method_run("simla", compile=True)
    step = Step(run, Losses(run, make_model(run), None, CLS, None), 10, Comm(), CPU)
    step(0, batches(0, 1))
    first = programs()
    with eager(), torch.no_grad():
        step.losses.eval()
        step.losses(shorter(make_batch(1), 5), set(run.objectives.active()), dict.fromkeys(NAMES, 0.0), 0.1)
    assert programs() == first


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_generated_code_gives_the_same_losses():
    torch._dynamo.reset()
    plain = losses_of(method_run("simla", text__depth=1, vision__depth=1), steps=1)
    assert losses_of(method_run("simla", text__depth=1, vision__depth=1, compile=True), steps=1) == pytest.approx(
        plain, rel=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_step_reads_a_value_back(method, monkeypatch):
    run = method_run(method, **({"queue": 4 * B} if method in ("simla", "albef") else {}))
    step = Step(run, Losses(run, make_model(run), None, CLS, None), 10, Comm(), CPU)
    step(0, batches(0, 1))

    def refused(self, *args, **kwargs):
        raise AssertionError("the host waits for the device")

    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    with Syncs() as syncs:
        step(1, batches(2, 3))
    assert syncs.found == []


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_no_step_synchronises_a_gpu(method):
    run = method_run(method, **({"queue": 4 * B} if method in ("simla", "albef") else {}))
    device = torch.device("cuda")
    step = Step(run, Losses(run, make_model(run), None, CLS, None).to(device), 10, Comm(), device)
    on_device = [[(n, b.to(device)) for n, b in batches(s, s + 1)] for s in range(3)]
    step(0, on_device[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1, on_device[1])
        step(2, on_device[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_towers_have_nothing_that_they_do_not_use():
    for method in ("clip", "siglip"):
        model = make_model(method_run(method))
        names = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
        assert model.teacher is None and model.queue is None and model.itm_head is None
        assert not any(part in name for name in names for part in ("crossattention", "cls.predictions", "mask_token"))
        assert ("scale.bias" in names) == (method == "siglip") and "scale.log_scale" in names


def test_albef_fuses_in_the_upper_half_alone():
    model = make_model(method_run("albef", text__depth=4))
    for towers in (model.student, model.teacher.towers):
        assert [hasattr(layer, "crossattention") for layer in towers.text.encoder.layer] == [False, False, True, True]
        assert not hasattr(towers, "mim_head") and not hasattr(towers, "concept_head")
    alone = make_model(make_run(("itc",), text__fusion="upper_half", text__depth=4))
    assert len(alone.student.text.encoder.layer) == 2  # without fusion nobody runs the upper half
    assert alone.student.text.embeddings.word_embeddings.weight.shape[0] == VOCAB

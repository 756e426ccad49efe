"""ALBEF, `official` variant, against numbers recorded from the official implementation; every set with model "albef".

Its token type vector, always that of type 0, is part of our positions. The sum is exact, and so are its gradient and
its EMA; but plain SGD moves the sum by both gradients, that of a position and that of the type vector, which is the sum
over positions. The test makes that second move itself.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from simla_ray.config.load import load_run
from simla_ray.models.checkpoint_io import load_strict
from simla_ray.models.forward import Negatives, forward_cross
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.official import ALBEF, from_official, from_official_name
from simla_ray.objectives.contrastive import similarities
from simla_ray.objectives.terms import loss_terms
from tests.golden.test_simla import CLS, FOLDERS, close, compare_stats, make_batch

SETS = {
    meta.parent.name: meta.parent
    for folder in FOLDERS
    for meta in sorted(folder.glob("*/meta.json"))
    if json.loads(meta.read_text()).get("model") == "albef"
}
TYPES, POSITIONS = "token_type_embeddings.weight", "position_embeddings.weight"


@pytest.fixture(params=sorted(SETS) or [None])
def folder(request):
    if request.param is None:
        pytest.skip("no golden set of ALBEF under SIMLA_GOLDEN_DIR or tests/golden/data")
    return SETS[request.param]


def build(folder, dtype):
    meta = json.loads((folder / "meta.json").read_text())
    text, vision = meta["text_config"], meta["vision_config"]
    assert text["fusion_layer"] * 2 == text["num_hidden_layers"]
    shape = {f"vision.{n}": vision[n] for n in ("image_px", "patch_px", "depth", "mlp_ratio")}
    shape |= {f"text.{n}": text[o] for n, o in (("width", "hidden_size"), ("depth", "num_hidden_layers"))}
    shape |= {f"text.{n}": text[o] for n, o in (("heads", "num_attention_heads"), ("ffn", "intermediate_size"))}
    shape |= {"text.max_positions": text["max_position_embeddings"], "text.max_tokens": 16, "text.dropout": 0.0}
    shape |= {"vision.width": vision["embed_dim"], "vision.heads": vision["num_heads"], "vision.pretrained": False}
    shape |= {"joint_width": meta["joint_width"], "queue": meta["queue_size"], "teacher.m": meta["momentum"]}
    shape |= {"batch.micro": meta["batch"], "batch.global": meta["batch"], "ray.workers": 1}
    run = load_run(overrides={"method": "albef", "variant": "official", "size": "base", **shape})
    model = Model(run, text["vocab_size"]).double().train()
    official = {
        n: t.double() for n, t in load_file(folder / "state_step0.safetensors").items() if t.is_floating_point()
    }
    ids = {"queue.ids": torch.full((meta["queue_size"],), -1)}
    load_strict(model, from_official(official).tensors | ids, folder)
    types = {m: official[f"text_encoder{m}.bert.embeddings.{TYPES}"][0].clone() for m in ("", "_m")}
    return meta, run, model.to(dtype), types


def one_step(model, run, inputs, dtype):
    objectives, active = run.objectives, set(run.objectives.active())
    empty = torch.zeros(4, 9)  # no patch is masked, and there are no codes
    batch = make_batch(inputs | {"masked_visual_token_pos": empty, "visual_token_ids": empty}, dtype)
    model.scale.clamp()
    model.teacher.update(model.student)
    given = Negatives(inputs["neg_image_idx_for_text"].long(), inputs["neg_text_idx_for_image"].long())
    record = forward_cross(model, batch, objectives, Needs.of(objectives, active, has_teacher=True), given=given)
    alphas = dict.fromkeys(active, float(inputs["alpha"]))
    terms = loss_terms(
        record, batch, objectives, active, alphas, scale=model.scale, queue=model.queue, codes=None, cls_id=CLS
    )
    return batch, record, terms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_two_steps_equal_the_official_ones(folder, dtype):
    rel = 1e-9 if dtype == torch.float64 else 1e-5
    meta, run, model, types = build(folder, dtype)
    first = load_file(folder / "step0_values.safetensors")
    names = sorted(n.removeprefix("grad.") for n in first if n.startswith("grad."))
    lr, m = meta["optimizer"]["lr"], meta["momentum"]
    for step in range(2):
        inputs = load_file(folder / f"step{step}_inputs.safetensors")
        values = load_file(folder / f"step{step}_values.safetensors")
        queues = model.queue.image.clone(), model.queue.text.clone()
        types["_m"] = m * types["_m"] + (1 - m) * types[""]
        batch, record, terms = one_step(model, run, inputs, dtype)
        for ours, theirs in {"itc": "ita", "itm": "itm", "mlm": "mlm"}.items():
            close(f"step {step} loss {ours}", terms[ours].loss, values[f"loss_{theirs}"], rel)
        total = sum(t.loss for t in terms.values())
        close(f"step {step} total", total, values["loss_total"], rel)
        compare_intermediates(model, record, batch, values, queues, rel)

        model.zero_grad(set_to_none=True)
        total.backward()
        compare_gradients(step, model, names, values, rel)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
            positions = model.student.text.embeddings.position_embeddings.weight
            of_type = positions.grad.sum(0)
            positions -= lr * of_type
            types[""] = types[""] - lr * of_type.double()
        model.queue.write(record.image_key, record.text_key, batch.image_id, step * len(batch))
        close("image queue", model.queue.image.T, values["image_queue_after"], rel)
        close("text queue", model.queue.text.T, values["text_queue_after"], rel)
    compare_state(folder, model, types, rel)


def compare_intermediates(model, record, batch, values, queues, rel):
    for ours, theirs in (
        ("image_vec", "image_feat"), ("text_vec", "text_feat"), ("image_key", "image_feat_m"),
        ("text_key", "text_feat_m"), ("match_logits", "itm_logits"),
    ):  # fmt: skip
        close(theirs, getattr(record, ours), values[theirs], rel)
    close("sim_i2t", similarities(record.image_vec, record.text_key, queues[1], model.temperature),
          values["sim_i2t"], rel)  # fmt: skip
    if "call.text_encoder.cls.0.out" in values:
        every = values["call.text_encoder.cls.0.out"]
        at = batch.mlm_index[:, :, None].expand(-1, -1, every.shape[-1])
        chosen = batch.mlm_weight > 0
        close("MLM logits", record.mlm_logits[chosen], every.gather(1, at)[chosen], rel)
        close("MLM teacher", record.mlm_teacher[chosen], values["call.text_encoder_m.cls.0.out.labelled"], rel)


def official_gradient(model, name):
    """A gradient under its official name; the type vector's is the sum over positions."""
    if name.endswith(TYPES):
        of_type = model.student.text.embeddings.position_embeddings.weight.grad.sum(0)
        return torch.stack([of_type, torch.zeros_like(of_type)])
    return dict(model.named_parameters())[from_official_name(name, ALBEF)[0]].grad


def compare_gradients(step, model, names, values, rel):
    whole = sum(values["grad_stats"][:, 0].double() ** 2).item() ** 0.5
    assert len(names) == len(values["grad_stats"])
    for name, stats in zip(names, values["grad_stats"].double(), strict=True):
        grad = official_gradient(model, name)
        compare_stats(f"step {step} gradient {name}", grad, stats, rel, 1e-3 * whole)
        full = values.get(f"grad.{name}")
        if full is not None:
            scale = max(full.double().norm().item(), 1e-3 * whole)
            assert (grad.double() - full.double()).norm().item() <= rel * scale, name


def official_tensor(model, types, name):
    """A tensor of the state under its official name, with positions and types taken apart again."""
    m = "_m" if name.startswith("text_encoder_m.") else ""
    if name.endswith(TYPES):
        return None  # its second row is never used and not ours to know
    ours, transposed = from_official_name(name, ALBEF)
    tensor = model.state_dict()[ours]
    if name.endswith(POSITIONS):
        tensor = tensor.double() - types[m]
    return tensor.T if transposed else tensor


def compare_state(folder, model, types, rel):
    after = load_file(folder / "state_after.safetensors")
    start = load_file(folder / "state_step0.safetensors")
    names = sorted(n for n, t in start.items() if t.is_floating_point())
    for name, stats in zip(names, after["state_stats"].double(), strict=True):
        tensor = official_tensor(model, types, name)
        if tensor is not None:
            compare_stats(f"state {name}", tensor, stats, rel, 1e-30)
    for name, full in after.items():
        if name in names and not name.endswith(TYPES):
            close(f"state {name}", official_tensor(model, types, name), full, rel)

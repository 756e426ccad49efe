"""UNITER's passes and objectives against numbers recorded from the official implementation.

Sets are looked for under SIMLA_GOLDEN_DIR (default ../shared/golden); every set whose meta.json says model "uniter" is
run, in fp64 at 1e-9 and in fp32 at 1e-5, as the sets' README asks.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simla_ray.config.load import load_run
from simla_ray.models.forward_regions import forward_regions
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.official_uniter import from_official_uniter, uniter_name
from simla_ray.models.regions import box_geometry
from simla_ray.objectives.terms import loss_terms
from simla_ray.objectives.word_patch import transport_plan
from simla_ray.types import Batch

FOLDER = Path(os.environ.get("SIMLA_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))
SETS = [m.parent for m in sorted(FOLDER.glob("*/meta.json")) if json.loads(m.read_text()).get("model") == "uniter"]
#: Our objective -> the pass it is recorded in, and its name there.
PASSES = {"mlm": "mlm", "mrfr": "mrfr", "mrc": "mrc", "mrckl": "mrc", "itm": "itm", "wpa": "itm"}
NAMES = {"itm": "itm_ce", "wpa": "wra"}
RTOL = {torch.float64: 1e-9, torch.float32: 2e-5}


@pytest.fixture(scope="module", params=SETS or [None], ids=lambda folder: folder and folder.name)
def golden(request):
    if request.param is None:
        pytest.skip("no golden set of UNITER under SIMLA_GOLDEN_DIR")
    return request.param


def build(folder, dtype):
    meta = json.loads((folder / "meta.json").read_text())
    text = meta["config"]
    run = load_run(
        overrides={
            "method": "uniter",
            "size": "base",
            "regions.source": "column",
            "regions.width": meta["img_dim"],
            "codes.n": meta["img_label_dim"] - 1,
            "text.width": text["hidden_size"],
            "text.depth": text["num_hidden_layers"],
            "text.heads": text["num_attention_heads"],
            "text.ffn": text["intermediate_size"],
            "text.max_positions": text["max_position_embeddings"],
            "text.max_tokens": 16,
            "text.dropout": 0.0,
            "objectives.mrc": {},
            "batch.micro": meta["batch"],
            "batch.global": meta["batch"],
            "ray.workers": 1,
        }
    )
    model = Model(run, text["vocab_size"])
    state = {name: t.to(dtype) for name, t in load_file(folder / "state_step0.safetensors").items()}
    missing, unknown = model.load_state_dict(from_official_uniter(state), strict=False)
    assert not unknown and set(missing) == {"region_codes.centroids", "region_codes.spread"}
    return run, model.to(dtype).train()


def batch_of(inputs, name, dtype):
    """A recorded pass as a batch: its words are clean, or masked with their labels; its images are as shown."""
    part = {k.removeprefix(f"{name}."): v for k, v in inputs.items() if k.startswith(f"{name}.")}
    ids, raw = part["input_ids"], inputs["raw.input_ids"]
    B, L = ids.shape
    where = part["img_pos_feat"].to(dtype)
    lengths = inputs["raw.txt_len"]
    text = torch.arange(L)[None] < lengths[:, None]
    there = torch.arange(where.shape[1])[None] < (part["attn_masks"].sum(1) - lengths)[:, None]
    batch = Batch(
        image=torch.zeros(B, 3, 8, 8, dtype=torch.uint8),
        token_ids=raw,
        token_mask=text,
        masked_ids=ids,
        mlm_index=torch.zeros(B, 1, dtype=torch.int64),
        mlm_weight=torch.zeros(B, 1, dtype=dtype),
        mlm_label=torch.zeros(B, 1, dtype=torch.int64),
        patch_mask=torch.zeros(0, 1, dtype=torch.bool),
        mim_index=torch.zeros(0, 1, dtype=torch.int64),
        mim_weight=torch.zeros(0, 1, dtype=dtype),
        word_start=torch.arange(L).expand(B, L),
        keyword_ok=text,
        keyword_prior=torch.zeros(B, L),
        image_id=torch.arange(B),
        regions=part["img_feat"].to(dtype),
        region_boxes=where[..., :4],
        region_mask=there,
    )
    if name == "mlm":
        batch.mlm_index, batch.mlm_weight = lists(part["txt_labels"] != -1, dtype)
        batch.mlm_label = part["txt_labels"].gather(1, batch.mlm_index).clamp(min=0)
    if "img_masks" in part:
        hidden = part["img_masks"]
        batch.region_hidden = hidden
        batch.mrm_index, batch.mrm_weight = lists(hidden, dtype)
        batch.regions = inputs["raw.img_feat"].to(dtype)  # the forward hides them itself
    return batch


class Recorded(torch.nn.Module):
    """The detector's soft labels of the hidden regions, in place of codes."""

    def __init__(self, inputs, dtype):
        super().__init__()
        hidden = inputs["mrc.img_masks"]
        index, weight = lists(hidden, dtype)
        self.soft = torch.zeros(*index.shape, inputs["mrc.label_targets"].shape[1], dtype=dtype)
        self.soft[weight.bool()] = inputs["mrc.label_targets"].to(dtype)

    def forward(self, features):
        return self.soft if features.shape[:2] == self.soft.shape[:2] else None


def lists(chosen, dtype):
    width = int(chosen.sum(1).max())
    index = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)[:, :width]
    weight = torch.arange(width)[None] < chosen.sum(1, keepdim=True)
    return torch.where(weight, index, 0), weight.to(dtype)


def one_pass(run, model, inputs, name, dtype):
    batch = batch_of(inputs, name, dtype)
    if name == "mrc":
        model.region_codes = Recorded(inputs, dtype)
    needs = Needs.of(run.objectives, {objective for objective, of in PASSES.items() if of == name}, has_teacher=False)
    # The images of ITM's pass are those that its texts were given.
    swapped = (inputs["itm.targets"], torch.arange(len(batch))) if name == "itm" else None
    return batch, forward_regions(model, batch, run.objectives, needs, swapped)


def close(found, wanted, dtype, what):
    scale = float(wanted.abs().max()) or 1.0
    np.testing.assert_allclose(found.detach(), wanted.to(dtype), rtol=0, atol=RTOL[dtype] * scale, err_msg=what)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_features_losses_and_gradients_equal_the_recorded_ones(golden, dtype):
    run, model = build(golden, dtype)
    inputs, values = (load_file(golden / f"step0_{kind}.safetensors") for kind in ("inputs", "values"))
    names = dict(model.named_parameters())
    total = torch.zeros((), dtype=dtype)
    for pass_name in ("mlm", "mrfr", "mrc", "itm"):
        active = {name for name, of in PASSES.items() if of == pass_name}
        batch, record = one_pass(run, model, inputs, pass_name, dtype)
        _features(values, inputs, batch, record, pass_name, dtype)
        terms = loss_terms(
            record, batch, run.objectives, active, {"mlm": 0.0}, scale=None, queue=None, codes=None, cls_id=101
        )
        assert set(terms) == active
        for name, term in terms.items():
            recorded = NAMES.get(name, name)
            close(term.loss, values[f"loss.{recorded}"], dtype, name)
            total = total + getattr(run.objectives, name).weight * term.loss.detach()
            model.zero_grad()
            term.loss.backward(retain_graph=True)
            _gradients(values, names, recorded, dtype)
    close(total, values["loss.total"], dtype, "total")


def _features(values, inputs, batch, record, name, dtype):
    kept = {"mlm": "mlm_logits", "mrfr": "region_logits", "mrc": "class_logits"}
    if name in kept:
        weight = batch.mlm_weight if name == "mlm" else batch.mrm_weight
        close(getattr(record, kept[name])[weight.bool()], values[f"{name}.logits"], dtype, name)
        return
    close(record.match_logits, values["itm.logits"], dtype, "itm")
    for states, mask, recorded in (
        (record.word_states, record.word_mask, "wra.txt_emb"),
        (record.patch_states, record.patch_mask, "wra.img_emb"),
    ):
        close(states[mask], values[recorded][mask], dtype, recorded)
    assert torch.equal(record.patch_mask, ~inputs["itm.img_pad"]) and torch.equal(
        record.word_mask, ~inputs["itm.txt_pad"]
    )


def _gradients(values, names, loss, dtype):
    """Of every parameter that the term reaches; against its norm, and against a thousandth of the whole gradient's."""
    prefix = f"grad.{loss}."
    recorded = {n.removeprefix(prefix): g for n, g in values.items() if n.startswith(prefix)}
    whole = float(torch.stack([g.norm() for g in recorded.values()]).norm())
    seen = set()
    for official, wanted in recorded.items():
        if official.endswith("token_type_embeddings.weight") or official.endswith("mask_embedding.weight"):
            wanted = wanted[1]  # row 0 of the one is part of the positions, of the other always zero
        ours = uniter_name(official)
        if ours is None:
            continue
        seen.add(ours)
        grad = names[ours].grad
        found = grad if grad is not None else torch.zeros_like(names[ours])
        scale = max(float(wanted.norm()), 1e-3 * whole)
        assert float((found - wanted.to(dtype)).norm()) <= RTOL[dtype] * scale, (loss, official)
    for name, parameter in names.items():
        if name not in seen and parameter.grad is not None:
            assert not parameter.grad.any(), (loss, name)


def test_geometry_is_the_recorded_one(golden):
    where = load_file(golden / "step0_inputs.safetensors")["raw.img_pos_feat"].double()
    np.testing.assert_allclose(box_geometry(where[..., :4], "seven"), where, rtol=1e-3, atol=1e-3)


def test_one_step_leaves_the_recorded_weights(golden):
    """Plain gradient descent on the sum of all terms."""
    dtype = torch.float64
    run, model = build(golden, dtype)
    inputs = load_file(golden / "step0_inputs.safetensors")
    for pass_name in ("mlm", "mrfr", "mrc", "itm"):
        active = {name for name, of in PASSES.items() if of == pass_name}
        batch, record = one_pass(run, model, inputs, pass_name, dtype)
        terms = loss_terms(
            record, batch, run.objectives, active, {"mlm": 0.0}, scale=None, queue=None, codes=None, cls_id=101
        )
        torch.stack([getattr(run.objectives, n).weight * t.loss for n, t in terms.items()]).sum().backward()
    lr = json.loads((golden / "meta.json").read_text())["optimizer"]["lr"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    after = {n: t for n, t in load_file(golden / "state_after.safetensors").items() if t.dtype == dtype or t.ndim}
    ours = dict(model.named_parameters())
    positions = "uniter.embeddings.position_embeddings.weight"
    for official, wanted in after.items():
        try:
            name = uniter_name(official)
        except KeyError:
            continue
        if name is None or official == positions:  # type 0 moves with the positions, and the fold counts it once
            continue
        wanted = wanted[1] if "token_type" in official or "mask_embedding" in official else wanted
        close(ours[name], wanted, dtype, official)


def test_transport_plans_equal_the_recorded_ones(golden):
    plans = load_file(golden / "ipot.safetensors")
    cost, x, y = plans["cost"], ~plans["x_pad"], ~plans["y_pad"]
    cost = cost.masked_fill(~(x[:, :, None] & y[:, None, :]), 0)
    cases = (("plan", 0.5, 50), ("plan_1_iteration", 0.5, 1), ("plan_2_iterations", 0.5, 2), ("plan_beta01", 0.1, 50))
    for name, beta, iterations in cases:
        close(transport_plan(cost, x, beta, iterations, y).transpose(1, 2), plans[name], torch.float64, name)

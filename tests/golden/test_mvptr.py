"""MVPTR against numbers recorded from the official implementation; every set with model "mvptr".

As in ALBEF's, the token type of text is part of our positions, see ``test_albef``. Our decoders are tied to the words'
table, as the official ones are meant to be; its code trains copies, which makes no difference in step 0 but for that
table's gradient. ``tied_values`` holds both steps with decoders that are tied.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from simla_ray.config.load import load_run
from simla_ray.models.checkpoint_io import load_strict
from simla_ray.models.forward_two_stage import Draws, forward_two_stage, mismatched
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.objectives.terms import loss_terms
from simla_ray.types import Batch
from tests.golden.test_simla import FOLDERS, close, compare_stats, pad_index

SETS = {
    meta.parent.name: meta.parent
    for folder in FOLDERS
    for meta in sorted(folder.glob("*/meta.json"))
    if json.loads(meta.read_text()).get("model") == "mvptr"
}
OURS = {
    "bert.embeddings.": "student.text.embeddings.",
    "bert.txt_encoder.": "student.text.encoder.",
    "bert.vis_encoder.": "student.vision.encoder.",
    "bert.mul_encoder.": "student.merging.encoder.",
    "bert.img_embedding.": "student.vision.regions.",
    "bert.pooler.dense.": "student.merging.pooler.",
    "cls.predictions.": "student.text.cls.predictions.",
    "half_mlm.": "student.vision.tag_head.",
    "cls.seq_relationship.": "itm_head.",
}
SINGLE = {
    "bert.txt_proj": "student.text_proj.weight",
    "bert.vis_proj": "student.vision_proj.weight",
    "logit_scale": "scale.log_scale",
}
WORDS, POSITIONS, TYPES = (f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
TABLES = [f"student.text.embeddings.{kind}_embeddings.weight" for kind in ("word", "concept")]
LOSSES = {"mcr": "mcr", "itc": "vsc", "mlm": "mlm", "itm": "itm", "wpg": "wpg"}


@pytest.fixture(params=sorted(SETS) or [None])
def folder(request):
    if request.param is None:
        pytest.skip("no golden set of MVPTR under SIMLA_GOLDEN_DIR or tests/golden/data")
    return SETS[request.param]


def official(name, tensors):
    """A tensor of ours under its official name, in the official layout.

    Words and concepts are one table there; a match has label 0; projections act as h @ W.
    """
    if name == WORDS:
        return torch.cat([tensors[table] for table in TABLES])
    ours = SINGLE.get(name) or next(b + name.removeprefix(a) for a, b in OURS.items() if name.startswith(a))
    tensor = tensors[ours]
    if name.startswith("cls.seq_relationship."):
        return tensor.flip(0)
    return tensor.T if name.endswith("_proj") else tensor


def from_official(name, tensor, words):
    if name == WORDS:
        return dict(zip(TABLES, (tensor[:words], tensor[words:]), strict=True))
    if name == TYPES:
        return {"student.vision.tag_type": tensor[1] - tensor[0]}
    ours = SINGLE.get(name) or next(b + name.removeprefix(a) for a, b in OURS.items() if name.startswith(a))
    if name.startswith("cls.seq_relationship."):
        tensor = tensor.flip(0)
    return {ours: tensor.T.contiguous() if name.endswith("_proj") else tensor}


def of_types(grads):
    """Gradients of both token types: the sum over all positions is that of both, for each place has one."""
    of_tags = grads["student.vision.tag_type"]
    return torch.stack([grads["student.text.embeddings.position_embeddings.weight"].sum(0) - of_tags, of_tags])


def left_out(name):
    """The decoders' copies of the words' table, and a head that nothing trains."""
    return name.endswith("decoder.weight") or name.startswith("qa_head.")


def build(folder, dtype):
    meta = json.loads((folder / "meta.json").read_text())
    text = meta["text_config"]
    sizes = {"width": "hidden_size", "heads": "num_attention_heads", "ffn": "intermediate_size"}
    shape = {f"text.{ours}": text[theirs] for ours, theirs in sizes.items()}
    shape |= {"text.depth": text["num_hidden_layers"], "text.max_positions": text["max_position_embeddings"]}
    shape |= {"text.max_tokens": meta["max_seq_length"] - 1, "text.concepts": meta["max_phrases"], "text.dropout": 0.0}
    shape |= {"concepts.most": text["vocab_size"] - meta["word_ids"], "tags.max_tokens": meta["max_tag_length"]}
    shape |= {"regions.source": "column", "regions.max": meta["max_regions"], "regions.width": meta["detector_dim"]}
    shape |= {"regions.grid": 1, "joint_width": text["hidden_size"], "data.augment": "crop"}
    shape |= {"batch.micro": meta["batch"], "batch.global": meta["batch"], "ray.workers": 1}
    run = load_run(overrides={"method": "mvptr", "variant": "official", "size": "base", **shape, "data.decode_cpus": 1})
    model = Model(run, meta["word_ids"]).double()
    state = {}
    for name, tensor in load_file(folder / "state_step0.safetensors").items():
        if not left_out(name):
            state |= from_official(name, tensor.double(), meta["word_ids"])
    types = load_file(folder / "state_step0.safetensors")[TYPES].double()
    state["student.text.embeddings.position_embeddings.weight"] += types[0]
    load_strict(model, state, folder)
    return meta, run, model.to(dtype).train(), types[0]


def make_batch(x, dtype):
    B, G = x["input_ids_b"].shape
    words, tags = (x[f"lm_labels_{side}"] for side in "ab")
    tags = tags[:, :G]
    (mlm_index, mlm_weight), (mcr_index, mcr_weight) = pad_index(words > -1), pad_index(tags > -1)
    boxes = x["region_boxes"].to(dtype) / x["image_size"].to(dtype).repeat(1, 2)[:, None, :]
    there = x["attention_mask_b"][:, G:].bool()
    L = words.shape[1]
    start, end = x["phrase_index"][:, :1], x["phrase_index"][:, 1:]
    none = torch.zeros(B, 0, dtype=torch.int64)
    return Batch(
        image=torch.zeros(B, 3, 1, 1),
        token_ids=torch.where(words > -1, words, x["input_ids_a"]).long(),
        token_mask=x["attention_mask_a"].bool(),
        masked_ids=x["input_ids_a"].long(),
        mlm_index=mlm_index, mlm_weight=mlm_weight.to(dtype), mlm_label=words.gather(1, mlm_index).clamp(min=0).long(),
        patch_mask=none.bool(), mim_index=none, mim_weight=none.to(dtype),
        word_start=none, keyword_ok=none.bool(), keyword_prior=none.to(dtype),
        image_id=torch.arange(B),
        is_concept=(torch.arange(L) >= start) & (torch.arange(L) < end),
        tag_ids=torch.where(tags > -1, tags, x["input_ids_b"]).long(),
        masked_tag_ids=x["input_ids_b"].long(),
        mcr_index=mcr_index, mcr_weight=mcr_weight.to(dtype),
        regions=x["region_x32"].to(dtype) / 32, region_mask=there,
        region_boxes=boxes.masked_fill(~there[:, :, None], 0),
    )  # fmt: skip


def recorded_draws(x, dtype):
    """Ranks of the k-th phrase lie at the k-th concept's place."""
    ranks = torch.zeros(2, *x["input_ids_a"].shape, dtype=dtype)
    for b, (start, end) in enumerate(x["phrase_index"].tolist()):
        for i, kind in enumerate(("pos", "neg")):
            ranks[i, b, start:end] = (x[f"wpg_{kind}_rank"][b, : end - start].to(dtype) + 0.5) / 3
    return Draws(x["dice_index"].long(), x["wpg_neg_image"].long(), ranks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_two_steps_equal_the_official_ones(folder, dtype):
    rel = 1e-9 if dtype == torch.float64 else 1e-5
    meta, run, model, of_text = build(folder, dtype)
    tied = load_file(folder / "tied_values.safetensors")
    objectives, active = run.objectives, set(run.objectives.active())
    needs = Needs.of(objectives, active, has_teacher=False)
    for step in range(2):
        inputs = load_file(folder / f"step{step}_inputs.safetensors")
        values = load_file(folder / f"step{step}_values.safetensors")
        batch = make_batch(inputs, dtype)
        record = forward_two_stage(model, batch, objectives, needs, given=recorded_draws(inputs, dtype))
        terms = loss_terms(
            record, batch, objectives, active, dict.fromkeys(active, 0.0),
            scale=model.scale, queue=None, codes=None, cls_id=101,
        )  # fmt: skip
        for ours, theirs in LOSSES.items():
            close(f"step {step} {ours}", terms[ours].loss, tied[f"step{step}.loss_{theirs}"], rel)
        total = sum(term.loss for term in terms.values())
        close(f"step {step} total", total, tied[f"step{step}.loss_total"], rel)
        picks = mismatched(model, batch, record, objectives.itm, 0.0, inputs["dice_index"].long())
        assert torch.equal(picks[0], inputs["neg_pair_text_index"].long())
        assert torch.equal(picks[1], inputs["neg_pair_image_index"].long())
        if step == 0:  # from then on the official decoders went ways of their own
            compare_intermediates(record, batch, values, rel)
        model.zero_grad(set_to_none=True)
        total.backward()
        compare_gradients(step, model, values, tied, rel)
        with torch.no_grad():
            lr, tag_type = meta["optimizer"]["lr"], model.student.vision.tag_type
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
            positions = model.student.text.embeddings.position_embeddings.weight
            moved = lr * (positions.grad.sum(0) - tag_type.grad)  # of the type that is part of the positions
            positions -= moved
            tag_type += moved
            of_text = of_text - moved.double()
    compare_state(folder, model, of_text, tied, rel)


def compare_intermediates(record, batch, values, rel):
    close("text_embed", record.text_vec, values["text_embed"], rel)
    close("image_embed", record.image_vec, values["image_embed"], rel)
    close("itm_logits", record.match_logits.flip(1), values["itm_logits"], rel)
    close("mlm_logits", record.mlm_logits[batch.mlm_weight > 0], values["mlm_logits"], rel)
    close("mcr_logits", record.tag_logits[batch.mcr_weight > 0], values["mcr_logits"], rel)
    fused = torch.cat([record.phrase_states, record.region_states], 1)
    there = torch.cat([batch.token_mask, batch.region_mask], 1)
    close("sequence_output", fused[there], values["sequence_output"][there], rel)


def compare_gradients(step, model, values, tied, rel):
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = sorted(n.removeprefix("grad.") for n in values if n.startswith("grad."))
    names = [name for name in names if not left_out(name)]
    stats = tied[f"step{step}.grad_stats"].double()
    whole = sum(stats[:, 0] ** 2).item() ** 0.5
    assert len(names) == len(stats)
    for name, row in zip(names, stats, strict=True):
        grad = of_types(grads) if name == TYPES else official(name, grads)
        compare_stats(f"step {step} gradient {name}", grad, row, rel, 1e-3 * whole)
        full = tied[f"step{step}.grad.{name}"] if name == WORDS else values[f"grad.{name}"] if step == 0 else None
        if full is not None:
            scale = max(full.double().norm().item(), 1e-3 * whole)
            assert (grad.double() - full.double()).norm().item() <= rel * scale, name


def compare_state(folder, model, of_text, tied, rel):
    state = model.state_dict()
    positions, of_tags = TABLES[0].replace("word", "position", 1), of_text + state["student.vision.tag_type"]
    state[positions] = state[positions] - of_text
    names = sorted(load_file(folder / "state_step0.safetensors"))
    names = [n for n in names if not n.endswith("decoder.weight")]
    assert len(names) == len(tied["state_stats"])
    for name, row in zip(names, tied["state_stats"].double(), strict=True):
        if name == TYPES:
            compare_stats("state of types", torch.stack([of_text, of_tags]), row, rel, 1e-30)
        elif not left_out(name):
            compare_stats(f"state {name}", official(name, state), row, rel, 1e-30)
    close("words", official(WORDS, state), tied[f"after.{WORDS}"], rel)


def test_every_loss_reaches_what_the_official_one_reaches(folder):
    """Gradient of each term alone, tensor by tensor; the decoders' own parts are those of the words' table here."""
    _, run, model, _ = build(folder, torch.float64)
    inputs, values = (load_file(folder / f"step0_{kind}.safetensors") for kind in ("inputs", "values"))
    objectives, active = run.objectives, set(run.objectives.active())
    needs, batch = Needs.of(objectives, active, has_teacher=False), make_batch(inputs, torch.float64)
    names = sorted(n.removeprefix("grad.") for n in values if n.startswith("grad."))
    for ours, theirs in LOSSES.items():
        record = forward_two_stage(model, batch, objectives, needs, given=recorded_draws(inputs, torch.float64))
        terms = loss_terms(
            record, batch, objectives, active, dict.fromkeys(active, 0.0),
            scale=model.scale, queue=None, codes=None, cls_id=101,
        )  # fmt: skip
        model.zero_grad(set_to_none=True)
        terms[ours].loss.backward()
        stats = values[f"grad_stats.loss_{theirs}"].double()
        whole = sum(stats[:, 0] ** 2).item() ** 0.5
        grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
        for name, row in zip(names, stats, strict=True):
            if not left_out(name) and (name != WORDS or ours not in ("mlm", "mcr")):
                grad = of_types(grads) if name == TYPES else official(name, grads)
                compare_stats(f"{ours} {name}", grad, row, 1e-9, 1e-3 * whole)

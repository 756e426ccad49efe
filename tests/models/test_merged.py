"""Fusion `merged`: its forward against transformers' ViltModel, its passes, and what it does without."""

from collections import Counter

import numpy as np
import pytest
import torch

from simla_ray.config.load import load_finetuning, load_run
from simla_ray.models.family import forward
from simla_ray.models.forward_merged import half_swapped
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.reranking import TextStarts, merged_cls
from simla_ray.models.stack import Attentions
from simla_ray.objectives.terms import loss_terms
from tests.models.toy import CLS, SHAPE, VOCAB, B, L, N, make_batch, make_model

KEYS = {k: v for k, v in SHAPE.items() if not k.startswith(("objectives.", "teacher", "queue"))} | {"vision.depth": 2}
NAMES = ("itm", "mlm", "wpa")


def make_run(on=NAMES, **overrides):
    off = {f"objectives.{name}": None for name in NAMES if name not in on}
    return load_run(
        overrides={**KEYS, "method": "vilt", **off, **{k.replace("__", "."): v for k, v in overrides.items()}}
    )


def run_forward(model, run, batch, active=None):
    active = set(run.objectives.active()) if active is None else set(active)
    record = forward(model, batch, run.objectives, Needs.of(run.objectives, active, has_teacher=False))
    alphas = dict.fromkeys(active, 0.0)
    terms = loss_terms(
        record, batch, run.objectives, active, alphas, scale=model.scale, queue=None, codes=None, cls_id=CLS
    )
    return record, terms


#: Ours below ``student.`` -> transformers' name; blocks and their joined projections are taken apart in the test.
VILT = {
    "text.embeddings.word_embeddings.weight": "embeddings.text_embeddings.word_embeddings.weight",
    "text.embeddings.position_embeddings.weight": "embeddings.text_embeddings.position_embeddings.weight",
    "text.embeddings.LayerNorm.weight": "embeddings.text_embeddings.LayerNorm.weight",
    "text.embeddings.LayerNorm.bias": "embeddings.text_embeddings.LayerNorm.bias",
    "merging.type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    "merging.pooler.weight": "pooler.dense.weight",
    "merging.pooler.bias": "pooler.dense.bias",
    "vision.vit.cls_token": "embeddings.cls_token",
    "vision.vit.pos_embed": "embeddings.position_embeddings",
    "vision.vit.patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "vision.vit.patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "vision.vit.norm.weight": "layernorm.weight",
    "vision.vit.norm.bias": "layernorm.bias",
}
BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def of_vilt(state, depth):
    """A ViltModel's state under our names."""
    found = {f"student.{ours}": state[theirs] for ours, theirs in VILT.items()}
    types = state["embeddings.text_embeddings.token_type_embeddings.weight"]
    found["student.text.embeddings.position_embeddings.weight"] = (
        found["student.text.embeddings.position_embeddings.weight"] + types[0]
    )
    for i in range(depth):
        ours, theirs = f"student.vision.vit.blocks.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            for a, b in BLOCK.items():
                found[f"{ours}{a}.{kind}"] = state[f"{theirs}{b}.{kind}"]
            parts = [state[f"{theirs}attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            found[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
    return found


def test_equals_transformers_vilt_model(monkeypatch):
    from transformers import ViltConfig, ViltModel

    run = make_run(vision__mlp_ratio=2.0)
    model = make_model(run).eval()
    torch.manual_seed(1)
    config = ViltConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, image_size=24, patch_size=8, max_image_length=-1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    vilt = ViltModel(config).eval()
    with torch.no_grad():
        for parameter in vilt.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for name, module in vilt.named_modules():  # the library has one epsilon, the official code BERT's and timm's
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12 if "text_embeddings" in name else 1e-6
    given = of_vilt(vilt.state_dict(), 2)
    absent = model.load_state_dict(given, strict=False)
    assert not absent.unexpected_keys
    assert all(n.startswith(("student.text.cls.", "itm_head.")) for n in absent.missing_keys)
    # It draws the order of an image's patches, which means nothing without positions; ours stay in theirs.
    monkeypatch.setattr(torch, "multinomial", lambda weights, n, *_: torch.arange(n))
    batch, image = make_batch(), torch.randn(B, 3, 24, 24)
    with torch.no_grad():
        theirs = vilt(
            input_ids=batch.token_ids, attention_mask=batch.token_mask.long(), pixel_values=image,
            pixel_mask=torch.ones(B, 24, 24, dtype=torch.long),
        )  # fmt: skip
        patches = model.student.vision(image)
        embedded = model.student.text.embeddings(batch.token_ids)
        words, seen = model.student.merging(model.student.vision, embedded, batch.token_mask, patches)
        pooled = model.student.pool(words[:, 0])
    torch.testing.assert_close(words, theirs.last_hidden_state[:, :L], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen, theirs.last_hidden_state[:, L:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, theirs.pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", [("itm", "mlm", "wpa"), ("mlm",), ("itm", "wpa"), ("itm",), ("wpa",), ("itm", "mlm")])
def test_passes_are_those_of_the_table_and_reach_every_parameter(on):
    """methods.md 6.3, row `vilt`: masked words, and clean ones that ITM and WPA share; nothing twice."""
    run = make_run(on)
    model = make_model(run)
    rows, calls = Counter(), Counter()

    def count(name):
        def hook(module, args):
            rows[name] += len(args[0]) / B
            calls[name] += 1

        return hook

    model.student.vision.register_forward_pre_hook(count("patches"))
    for i, block in enumerate(model.student.vision.vit.blocks):
        block.register_forward_pre_hook(count(f"block {i}"))
    model.trainable_in(set(on))
    _, terms = run_forward(model, run, make_batch())
    passes = ("mlm" in on) + bool({"itm", "wpa"} & set(on))
    assert rows == {"patches": 1, "block 0": passes, "block 1": passes}
    assert set(calls.values()) == {1}
    torch.stack([term.loss for term in terms.values()]).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert ("student.merging.pooler.weight" in model.state_dict()) == ("itm" in on)


def test_what_needs_towers_is_absent():
    names = set(make_model(make_run()).state_dict())
    assert not [n for n in names if n.startswith(("teacher.", "queue.", "scale.")) or "_proj." in n]
    assert not [n for n in names if ".encoder.layer." in n or "mim_head" in n or "concept_head" in n]


@pytest.mark.parametrize("rows", [2, 3, 8, 33])
def test_exactly_half_keep_their_image(rows):
    torch.manual_seed(0)
    image_id = torch.arange(rows) // (2 if rows > 3 else 1)
    taken = Counter()
    for _ in range(200):
        label, index = half_swapped(image_id, True)
        assert label.sum() == rows // 2
        assert torch.equal(index[label == 1], torch.arange(rows)[label == 1])
        assert (image_id[index] != image_id)[label == 0].all()
        taken.update(label.tolist())
        taken.update(f"{b}" for b in torch.nonzero(label)[:, 0].tolist())
    assert len([k for k in taken if isinstance(k, str)]) == rows  # which ones is drawn
    label, index = half_swapped(torch.zeros(rows, dtype=torch.int64), False)
    assert (index != torch.arange(rows))[label == 0].all()


def test_draws_go_by_the_seed_of_the_micro_batch():
    run = make_run()
    model, found = make_model(run).eval(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(run_forward(model, run, make_batch(rows=16))[0])
    assert torch.equal(found[0].negative_image, found[1].negative_image)
    assert not torch.equal(found[0].negative_image, found[2].negative_image)


def test_the_swapped_image_is_what_the_pair_is_scored_on():
    run, batch = make_run(), make_batch()
    model = make_model(run).eval()
    with torch.no_grad():
        record, _ = run_forward(model, run, batch)
        tokens = model.student.vision(batch.image)
        states = model.student.fuse(tokens, record.negative_image, batch.token_ids, batch.token_mask)
        torch.testing.assert_close(record.match_logits, model.match(states[:, 0]))
        states = model.student.fuse(tokens, None, batch.masked_ids, batch.token_mask)
        words = model.student.text.word_logits(states)
        expected = words.gather(1, batch.mlm_index[:, :, None].expand(-1, -1, VOCAB))
        torch.testing.assert_close(record.mlm_logits, expected)


def test_shortcuts_give_what_the_whole_pass_gives():
    """[CLS] alone, attention kept, and pairs in any order."""
    run, batch = make_run(), make_batch()
    model = make_model(run).eval()
    student = model.student
    with torch.no_grad():
        tokens = student.vision(batch.image)
        whole = student.fuse(tokens, None, batch.token_ids, batch.token_mask)
        words = student.text.embeddings(batch.token_ids)
        cls = student.merging.cls(student.vision, words, batch.token_mask, tokens)
        torch.testing.assert_close(cls, whole[:, 0], rtol=1e-5, atol=1e-6)
        keep = Attentions(want_cross=True)
        kept = student.fuse(tokens, None, batch.token_ids, batch.token_mask, keep)
        torch.testing.assert_close(kept, whole, rtol=1e-5, atol=1e-6)
        assert [tuple(a.shape) for a in keep.cross] == [(B, 4, L, N)] * 2
        image, text = np.array([3, 0, 0, 2, 1]), np.array([0, 3, 1, 1, 2])
        starts = TextStarts(student.text, batch.token_ids, batch.token_mask)
        found = merged_cls(student, tokens, starts, image, text, batch_size=2)
        for k, (i, t) in enumerate(zip(image, text, strict=True)):
            n = int(batch.token_mask[t].sum())
            ids, mask = batch.token_ids[t : t + 1, :n], batch.token_mask[t : t + 1, :n]
            alone = student.fuse(tokens[i : i + 1], None, ids, mask)[0, 0]
            torch.testing.assert_close(found[k], alone, rtol=1e-5, atol=1e-6)


def test_pads_are_not_read():
    run, batch = make_run(), make_batch()
    model = make_model(run).eval()
    with torch.no_grad():
        tokens = model.student.vision(batch.image)
        one = model.student.fuse(tokens, None, batch.token_ids, batch.token_mask)
        other = torch.where(batch.token_mask, batch.token_ids, 7)
        two = model.student.fuse(tokens, None, other, batch.token_mask)
    torch.testing.assert_close(one[batch.token_mask], two[batch.token_mask])


def test_a_vision_transformers_weights_start_the_stack(tmp_path):
    from safetensors.torch import save_file

    from simla_ray.models.checkpoint_io import load_vit

    vit = make_model(make_run(vision__image_px=32), seed=3).student.vision.vit  # 4 x 4 patches: positions are resized
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model: Model = make_model(make_run())
    load_vit(model.student.vision, tmp_path / "vit.safetensors")
    assert torch.equal(model.student.vision.vit.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("vqa", {"objectives.answers": {"most": 5}}),
        ("vqa", {"objectives.answers": {"most": 5, "head": "classifier"}}),
        ("nlvr", {}),
        ("nlvr2", {}),
    ],
)
def test_fine_tuned_tasks_read_the_merged_states_and_train_all_they_have(task, more):
    run = load_finetuning(
        make_run(), overrides={"task": task, "batch.micro": B, "batch.global": 2 * B, "text.max_tokens": 30, **more}
    )
    model, batch = make_model(run), make_batch()
    batch.second_image = make_batch(1).image if task == "nlvr2" else None
    batch.answer_ids, batch.label = torch.tensor([[2, 7, 3, 0], [2, 7, 8, 3]] * 2), torch.tensor([0, 1, 0, 1])
    on = set(run.objectives.active())
    model.trainable_in(on)
    _, terms = run_forward(model, run, batch)
    assert set(terms) == on and len(on) == 1
    terms[on.pop()].loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n, p in model.named_parameters() if not p.requires_grad]

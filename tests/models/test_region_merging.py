"""Words and regions in one BERT: against transformers' BertModel, padding, passes, and what a hidden region tells."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from simla_ray.config.load import load_finetuning, load_run
from simla_ray.data.regions import grid_boxes
from simla_ray.errors import UserError
from simla_ray.models.family import forward
from simla_ray.models.needs import Needs
from simla_ray.models.region_codes import RegionCodes
from simla_ray.models.regions import grid_cells
from simla_ray.models.reranking import TextStarts, merged_cls
from simla_ray.models.stack import Stack
from simla_ray.objectives.terms import loss_terms
from tests.models.toy import CLS, SHAPE, VOCAB, B, make_batch, make_model

KEYS = {k: v for k, v in SHAPE.items() if not k.startswith(("objectives.", "teacher", "queue", "schedule"))}
R, D = 5, 16


def make_run(**overrides):
    keys = {"method": "uniter", "regions.source": "boxes", "codes.n": 6, "objectives.mrckl.reduction": "element"}
    return load_run(overrides={**KEYS, **keys, **{k.replace("__", "."): v for k, v in overrides.items()}})


def region_batch(seed=0, regions=R):
    """Two to five regions each, of which the first is hidden."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(B, regions, 2, generator=g) * 0.5
    boxes = torch.cat([low, low + 0.2 + 0.3 * torch.rand(B, regions, 2, generator=g)], -1)
    there = torch.arange(regions)[None] < (torch.arange(B)[:, None] % 4 + 2)
    boxes = boxes * there[:, :, None]
    hidden = torch.zeros(B, regions, dtype=torch.bool)
    hidden[:, 0] = True
    index, weight = torch.zeros(B, 1, dtype=torch.int64), torch.ones(B, 1)
    return replace(
        make_batch(seed),
        region_boxes=boxes,
        region_mask=there,
        region_hidden=hidden,
        mrm_index=index,
        mrm_weight=weight,
    )


def run_forward(model, run, batch, active=None):
    active = set(run.objectives.active()) if active is None else set(active)
    record = forward(model, batch, run.objectives, Needs.of(run.objectives, active, has_teacher=False))
    alphas = dict.fromkeys(active, 0.0)
    return record, loss_terms(
        record, batch, run.objectives, active, alphas, scale=None, queue=None, codes=None, cls_id=CLS
    )


def test_cells_of_data_and_model_are_the_same():
    np.testing.assert_array_equal(grid_boxes(7), grid_cells(7).numpy())


def test_one_pair_without_padding_is_what_transformers_bert_makes_of_its_embeddings():
    from transformers import BertConfig, BertModel

    run = make_run()
    model = make_model(run).eval()
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=run.text.depth, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertModel(config).eval()
    absent = bert.load_state_dict(
        {f"encoder.{n}": t for n, t in model.student.text.encoder.state_dict().items()}, strict=False
    )
    assert not absent.unexpected_keys
    batch, student = region_batch(), model.student
    with torch.no_grad():
        regions = student.vision(batch.image, batch.regions, batch.region_boxes, batch.region_mask)
        words = student.text.embeddings(batch.token_ids)
        states, seen = student.merging(student.layers, words, batch.token_mask, regions)
        for b in range(B):
            n, r = int(batch.token_mask[b].sum()), int(batch.region_mask[b].sum())
            packed = torch.cat([words[b, :n], regions[b, :r]])[None]
            alone = bert.encoder(packed).last_hidden_state[0]
            torch.testing.assert_close(states[b, :n], alone[:n], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(seen[b, :r], alone[n:], rtol=1e-5, atol=1e-5)


def test_regions_that_are_not_there_change_nothing():
    run = make_run()
    model, batch = make_model(run).eval(), region_batch()
    wide = replace(
        batch,
        region_boxes=torch.nn.functional.pad(batch.region_boxes, (0, 0, 0, 3), value=0.5),
        region_mask=torch.nn.functional.pad(batch.region_mask, (0, 3)),
        region_hidden=torch.nn.functional.pad(batch.region_hidden, (0, 3)),
    )
    found = []
    for each in (batch, wide):
        torch.manual_seed(3)
        found.append({name: float(term.loss.detach()) for name, term in run_forward(model, run, each)[1].items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5) and set(found[0]) == {"itm", "mlm", "wpa", "mrfr", "mrckl"}


@pytest.mark.parametrize(
    ("active", "sequences"),
    [({"mlm"}, 1), ({"itm", "wpa"}, 1), ({"mrfr"}, 1), ({"mrfr", "mrckl"}, 1), ({"itm", "mlm", "wpa", "mrfr"}, 3)],
)
def test_passes(monkeypatch, active, sequences):
    """The table of specs: one fused pass for the sampled task."""
    run = make_run()
    model, batch, rows = make_model(run), region_batch(), []
    real = Stack.forward
    monkeypatch.setattr(
        Stack, "forward", lambda self, hidden, *a, **k: rows.append(len(hidden)) or real(self, hidden, *a, **k)
    )
    _, terms = run_forward(model, run, batch, active)
    assert rows == [sequences * B] and set(terms) == active


def test_a_hidden_region_is_not_seen_and_its_target_has_no_gradient():
    """Other pixels under it change what is to be recovered, and nothing that it is recovered from."""
    run = make_run()
    model, batch = make_model(run).eval(), region_batch()
    batch.region_boxes[:, 0] = torch.tensor([0.0, 0.0, 0.25, 0.25])
    batch.region_boxes[:, 1:] = batch.region_boxes[:, 1:].clamp(min=0.3).sort(2).values
    other = replace(batch, image=batch.image.clone())
    other.image[:, :, :6, :6] = 255 - other.image[:, :, :6, :6]
    (one, _), (two, _) = (run_forward(model, run, b, {"mrfr", "mrckl"}) for b in (batch, other))
    torch.testing.assert_close(one.region_logits, two.region_logits, rtol=0, atol=0)
    assert (one.region_features - two.region_features).abs().max() > 0.1
    assert not one.region_features.requires_grad and not one.class_target.requires_grad
    assert one.region_logits.shape == (B, 1, 192) and one.class_logits.shape == (B, 1, 7)


def test_every_trained_parameter_gets_a_gradient_and_no_other():
    run = make_run()
    model, batch = make_model(run), region_batch()
    for active in ({"mlm"}, {"itm", "wpa"}, {"mrfr"}, {"mrckl"}, set(run.objectives.active())):
        model.trainable_in(active)
        model.zero_grad()
        torch.stack([t.loss for t in run_forward(model, run, batch, active)[1].values()]).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, (sorted(active), name)


def test_shared_starts_give_the_states_of_whole_pairs():
    run = make_run()
    model, batch = make_model(run).eval(), region_batch()
    student = model.student
    with torch.no_grad():
        tokens = student.vision(batch.image, batch.regions, batch.region_boxes, batch.region_mask)
        starts = TextStarts(student.text, batch.token_ids, batch.token_mask)
        image, text = np.array([0, 3, 1, 1]), np.array([2, 0, 1, 3])
        found = merged_cls(student, tokens, starts, image, text, 3)
        for k, (i, t) in enumerate(zip(image, text, strict=True)):
            whole = student.fuse(tokens[i : i + 1], None, batch.token_ids[t : t + 1], batch.token_mask[t : t + 1])
            torch.testing.assert_close(found[k], whole[0, 0], rtol=1e-4, atol=1e-5)


def test_a_picture_alone_is_seen_by_cells_but_not_by_a_column():
    batch = region_batch()
    run = make_run(regions__grid=3)
    model = make_model(run)
    cells = model.student.vision(batch.image)
    boxes = torch.from_numpy(grid_boxes(3)).expand(B, -1, -1)
    torch.testing.assert_close(cells, model.student.vision(batch.image, None, boxes, None))
    column = make_model(make_run(regions__source="column", regions__width=7))
    with pytest.raises(UserError, match=r"regions\.source: column reads region_feats"):
        column.student.vision(batch.image)


def test_codes_are_soft_classes_by_distance():
    codes = RegionCodes(2, 1)
    codes.centroids, codes.spread = torch.tensor([[0.0], [2.0]]), torch.tensor(2.0)
    found = codes(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    near = 1 / (1 + np.exp(-2))  # squared distances 0 and 4, over 2
    np.testing.assert_allclose(found, [[0, near, 1 - near], [0, 0.5, 0.5]], rtol=1e-9)


@pytest.mark.parametrize("task", ["vqa", "entailment", "retrieval", "grounding"])
def test_tasks_train_all_that_is_there(task):
    keys = {"batch.micro": B, "batch.global": B, "ray.workers": 1, "text.max_tokens": 25}
    run = load_finetuning(make_run(), overrides={"task": task, **keys})
    model, batch = make_model(run), region_batch()
    batch = replace(batch, label=torch.zeros(B, dtype=torch.int64), answer_ids=torch.ones(B, 3, dtype=torch.int64))
    model.trainable_in(set(run.objectives.active()))
    torch.stack([t.loss for t in run_forward(model, run, batch)[1].values()]).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_annotated_classes_take_the_place_of_codes():
    run = make_run(regions__classes=["a", "b", "c"], objectives__mrc={})
    model, batch = make_model(run), replace(region_batch(), region_class=torch.tensor([[2, 0, 0, 0, 0]] * B))
    record, terms = run_forward(model, run, batch, {"mrc", "mrckl"})
    assert model.region_codes is None and record.class_logits.shape == (B, 1, 4)
    assert record.class_target[:, 0].tolist() == [[0, 0, 1, 0]] * B
    # Of a class that is certain, the divergence is the cross-entropy; its mean is over the four classes, too.
    assert float(terms["mrckl"].loss.detach()) == pytest.approx(float(terms["mrc"].loss.detach()) / 4, rel=1e-5)

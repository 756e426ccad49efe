"""Schedules of alpha and of ITM's eps, and which gradients each objective sends where."""

import pytest
import torch

from simla_ray.config.schema import Itc, Itm
from simla_ray.objectives.terms import alpha_at, itm_eps_at
from tests.models.toy import NAMES, B, Negatives, make_batch, make_model, make_run, run_forward


def test_alpha_ramps_linearly_then_stays():
    official = Itc(soft_alpha=0.4, alpha_ramp=1 / 30)  # 30 epochs: 0 -> 0.4 inside the first
    assert alpha_at(official, 0.0) == 0
    assert alpha_at(official, 0.5 / 30) == pytest.approx(0.2)
    assert alpha_at(official, 1 / 30) == pytest.approx(0.4)
    assert alpha_at(official, 0.9) == 0.4
    assert alpha_at(Itc(soft_alpha=0.4, alpha_ramp=0), 0.0) == 0.4
    assert alpha_at(Itc(soft_alpha=0.0), 0.5) == 0


def test_itm_eps_moves_geometrically():
    itm = Itm(eps=0.5, eps_end=0.02)
    assert itm_eps_at(itm, 0.0) == 0.5
    assert itm_eps_at(itm, 0.5) == pytest.approx(0.1)  # sqrt(0.5 * 0.02)
    assert itm_eps_at(itm, 1.0) == pytest.approx(0.02)
    assert itm_eps_at(Itm(eps=1e-4), 0.7) == 1e-4
    assert itm_eps_at(Itm(eps=0.0, eps_end=0.1), 0.7) == 0
    assert itm_eps_at(None, 0.3) == 0


def reached(model, loss):
    """Names of the parameters with a non-zero gradient, the temperature included."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
    return {n for (n, _), g in zip(named, grads, strict=True) if g is not None and g.abs().max() > 0}


def starts(names, *prefixes):
    return {n for n in names if n.startswith(prefixes)}


@pytest.fixture(scope="module")
def full():
    run = make_run(queue=16)
    model, batch = make_model(run), make_batch()
    with torch.no_grad():  # a teacher that differs from the student, a mask token that is not zero
        for p in model.teacher.master.parameters():
            p.add_(0.01 * torch.randn_like(p))
        model.student.vision.mask_token.normal_()
    record, terms = run_forward(model, run, batch)
    return model, run, batch, record, terms


def test_teacher_and_queue_get_no_gradient(full):
    model, _, _, record, terms = full
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert not any(b.requires_grad for b in model.queue.buffers())
    for name in ("image_key", "text_key", "mlm_teacher", "mim_teacher", "concept_teacher", "cls_attention"):
        assert not getattr(record, name).requires_grad, name
    total = sum(t.loss for t in terms.values())
    assert not starts(reached(model, total), "teacher.", "queue.")
    assert not any(m.requires_grad for t in terms.values() for m in t.metrics.values())


def test_psl_reaches_concept_head_projection_and_vit_and_nothing_of_the_text(full):
    model, *_, terms = full
    names = reached(model, terms["psl"].loss)
    assert {"student.concept_head.weight", "student.concept_head.bias", "student.vision_proj.weight"} <= names
    assert "student.vision.vit.patch_embed.proj.weight" in names
    assert names == starts(names, "student.concept_head.", "student.vision_proj.", "student.vision.vit.")


def test_itc_reaches_both_towers_and_the_temperature(full):
    model, *_, terms = full
    names = reached(model, terms["itc"].loss)
    assert {"scale.temperature", "student.vision_proj.weight", "student.text_proj.weight"} <= names
    assert "student.text.embeddings.word_embeddings.weight" in names
    assert "student.vision.vit.patch_embed.proj.weight" in names
    assert not {n for n in names if "crossattention" in n or "mask_token" in n or "text.cls." in n}
    assert not starts(names, "student.mim_head", "student.concept_head", "itm_head")


def test_only_itc_moves_the_temperature(full):
    model, *_, terms = full
    for name in NAMES:
        assert ("scale.temperature" in reached(model, terms[name].loss)) == (name == "itc"), name


def test_itm_reaches_the_vit_and_no_projection(full):
    model, *_, terms = full
    names = reached(model, terms["itm"].loss)
    assert {"itm_head.weight", "itm_head.bias", "student.vision.vit.patch_embed.proj.weight"} <= names
    assert "student.text.encoder.layer.0.crossattention.self.key.weight" in names
    assert not starts(names, "student.vision_proj", "student.text_proj", "student.text.cls", "student.mim_head")


def test_itm_reaches_images_through_positives_and_negatives():
    run = make_run(("itm",))
    model, batch = make_model(run), make_batch(floats=True)
    batch.image.requires_grad_()
    shift = (torch.arange(B) + 1) % B
    record, _ = run_forward(model, run, batch, given=Negatives(shift, shift))
    for rows, images in ((0, 0), (B, 1), (2 * B, 0)):  # first row of each group: the image it reads
        (grad,) = torch.autograd.grad(record.match_logits[rows].sum(), batch.image, retain_graph=True)
        touched = grad.flatten(1).abs().amax(1) > 0
        assert touched.tolist() == [i == images for i in range(B)]


def test_the_third_group_reads_the_negative_text():
    run = make_run(("itm",))
    model, batch = make_model(run), make_batch()
    shift = (torch.arange(B) + 1) % B
    record, _ = run_forward(model, run, batch, given=Negatives(shift, shift))
    batch.token_ids[1, 1] = (batch.token_ids[1, 1] + 1) % 35 + 5
    after, _ = run_forward(model, run, batch, given=Negatives(shift, shift))
    changed = (record.match_logits - after.match_logits).abs().amax(1) > 1e-8
    # text 1 stands in: matched row 1, (text 1, negative image) row B + 1, and as negative text of image 0 in row 2B
    assert changed.nonzero()[:, 0].tolist() == [1, B + 1, 2 * B]


def test_mim_reaches_text_embeddings_and_every_cross_attention(full):
    model, *_, terms = full
    names = reached(model, terms["mim"].loss)
    assert {
        "student.text.embeddings.word_embeddings.weight",
        "student.text.embeddings.position_embeddings.weight",
        "student.vision.mask_token",
        "student.mim_head.weight",
    } <= names
    for layer in range(2):
        for part in ("key", "value", "query"):
            assert f"student.text.encoder.layer.{layer}.crossattention.self.{part}.weight" in names
    assert not starts(names, "student.text.cls", "student.vision_proj", "student.text_proj", "itm_head")


def test_mim_gradient_reaches_the_captions_word_vectors():
    """Through keys and values of the text memory: rows of the caption's words, and no others."""
    run = make_run(("mim",))
    model, batch = make_model(run), make_batch()
    _, terms = run_forward(model, run, batch)
    weight = model.student.text.embeddings.word_embeddings.weight
    (grad,) = torch.autograd.grad(terms["mim"].loss, weight)
    used = set(batch.token_ids[batch.token_mask].tolist())
    assert set((grad.abs().amax(1) > 0).nonzero()[:, 0].tolist()) == used


def test_mlm_reaches_its_head_and_the_vit(full):
    model, *_, terms = full
    names = reached(model, terms["mlm"].loss)
    assert "student.text.cls.predictions.bias" in names
    assert "student.vision.vit.patch_embed.proj.weight" in names
    assert not starts(names, "student.vision_proj", "student.mim_head", "student.concept_head", "itm_head")


def test_mim_teacher_reads_student_text_without_gradient():
    """`student` reuses the student's tensor: the soft target depends on it, no gradient comes back through it."""
    run = make_run(("mim",), objectives__mim__soft_alpha=1.0)
    model, batch = make_model(run), make_batch()
    record, terms = run_forward(model, run, batch, alpha=1.0)
    assert not record.mim_teacher.requires_grad
    assert terms["mim"].loss.requires_grad
    moved = make_run(("mim",), objectives__mim__teacher_text="teacher")
    with torch.no_grad():
        model.teacher.master.text.embeddings.word_embeddings.weight.mul_(3)
    same, _ = run_forward(model, run, batch)
    other, _ = run_forward(model, moved, batch)
    assert torch.equal(same.mim_teacher, record.mim_teacher)
    assert not torch.allclose(other.mim_teacher, record.mim_teacher)


def test_an_objective_of_weight_zero_gives_no_term():
    run = make_run(objectives__mim__weight=0.0, objectives__psl__weight=0)
    _, terms = run_forward(make_model(run), run, make_batch())
    assert list(terms) == ["itc", "itm", "mlm"]

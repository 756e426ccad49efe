"""The passes of fine-tuned tasks, and the likelihoods that rank answers."""

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.models.decoder import decoder_start
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.question import answer_likelihoods, forward_question, question_cls
from simla_ray.models.stack import Memory
from tests.models.toy import NAMES, SHAPE, VOCAB, make_batch, make_model, make_run

ANSWERS = torch.tensor([[2, 7, 3, 0], [2, 7, 8, 3], [2, 9, 3, 0], [2, 9, 8, 3], [2, 11, 3, 0]])  # [CLS] 2, [SEP] 3


def task_run(**overrides):
    off = {f"objectives.{name}": None for name in NAMES}
    shape = {k: v for k, v in SHAPE.items() if k.split(".")[1:2] not in [[n] for n in NAMES]}
    return load_run(overrides={**shape, **off, **{k.replace("__", "."): v for k, v in overrides.items()}})


def forward(run, batch, seed=0):
    torch.manual_seed(seed)
    model = Model(run, VOCAB).double()
    needs = Needs.of(run.objectives, set(run.objectives.active()), has_teacher=False)
    return model, forward_question(model, batch, run.objectives, needs)


@pytest.fixture
def batch():
    made = make_batch()
    made.image = make_batch(floats=True).image.double()
    made.answer_ids = ANSWERS[:4]
    made.label = torch.tensor([0, 1, 0, 1])
    return made


@pytest.mark.parametrize("fusion", ["every_layer", "upper_half"])
def test_what_comes_later_in_an_answer_changes_nothing_before(batch, fusion):
    run = task_run(objectives__answers={"depth": 2}, text__fusion=fusion)
    _, record = forward(run, batch)
    assert record.answer_logits.shape == (4, 3, VOCAB)
    other = ANSWERS[:4].clone()
    other[:, 2] = 12
    batch.answer_ids = other
    _, changed = forward(run, batch)
    assert torch.equal(record.answer_logits[:, :2], changed.answer_logits[:, :2])
    assert not torch.allclose(record.answer_logits[:, 2], changed.answer_logits[:, 2])


@pytest.mark.parametrize("fusion", ["every_layer", "upper_half"])
def test_likelihoods_are_those_of_one_answer_at_a_time(batch, fusion):
    run = task_run(objectives__answers={"depth": 2}, text__fusion=fusion)
    model, _ = forward(run, batch)
    model.eval()
    states = model.student.text.encode(batch.token_ids, batch.token_mask, Memory(model.student.vision(batch.image)))
    expected = torch.full((4, 5), float("-inf"))
    for question in range(4):
        memory = Memory(states[question : question + 1], batch.token_mask[question : question + 1])
        for a in range(5):
            ids = ANSWERS[a][ANSWERS[a] != 0][None]
            logits = model.decoder(ids[:, :-1], memory).log_softmax(-1)
            expected[question, a] = logits[0].gather(1, ids[0, 1:, None]).sum()
    found = answer_likelihoods(model.decoder, states, batch.token_mask, ANSWERS, 0, 99)
    assert torch.allclose(found, expected, atol=1e-5)
    few = answer_likelihoods(model.decoder, states, batch.token_mask, ANSWERS, 0, 2)
    assert (few.isfinite().sum(1) == 2).all()
    assert torch.allclose(few[few.isfinite()], expected[few.isfinite()], atol=1e-5)


@pytest.mark.parametrize("fusion", ["every_layer", "upper_half"])
def test_two_pictures_are_read_apart_and_judged_together(batch, fusion):
    run = task_run(objectives__labels={"classes": ["a", "b"], "pictures": 2}, text__fusion=fusion)
    batch.second_image = batch.image.flip(0)
    model, record = forward(run, batch)
    each = [
        question_cls(model, model.student.vision(picture), batch.token_ids, batch.token_mask)
        for picture in (batch.image, batch.second_image)
    ]
    assert torch.allclose(record.label_logits, model.label_head(torch.cat(each, 1)))
    plain = model.student.text.encode(batch.token_ids, batch.token_mask, Memory(model.student.vision(batch.image)))
    assert torch.allclose(each[0], plain[:, 0])


def test_only_what_the_task_reads_is_there_and_learns(batch):
    for objective, value, head in (
        ("answers", {}, "decoder"),
        ("answers", {"head": "classifier", "most": 3}, "answer_head"),
        ("labels", {"classes": ["a", "b"]}, "label_head"),
    ):
        model, record = forward(task_run(**{f"objectives__{objective}": value}), batch)
        assert getattr(model, head) is not None
        assert sum(getattr(model, name) is not None for name in ("decoder", "answer_head", "label_head")) == 1
        assert model.teacher is None and model.itm_head is None and not hasattr(model.student, "vision_proj")
        model.trainable_in({objective})
        out = record.answer_logits if record.answer_logits is not None else record.label_logits
        out.sum().backward()
        untouched = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert untouched == set()


def test_a_decoder_starts_as_the_upper_layers_of_the_text_stack():
    start = make_model(make_run(text__depth=3))
    run = task_run(objectives__answers={"depth": 2}, text__depth=3)
    torch.manual_seed(1)
    ours = Model(run, VOCAB).state_dict()
    found = decoder_start(ours, start.state_dict())
    assert set(found) == {name for name in ours if name.startswith("decoder.")}
    for name in ("attention.self.query.weight", "crossattention.self.key.weight", "output.dense.weight"):
        for mine, theirs in ((0, 1), (1, 2)):
            taken = start.state_dict()[f"student.text.encoder.layer.{theirs}.{name}"]
            assert torch.equal(found[f"decoder.encoder.layer.{mine}.{name}"], taken)
    table = start.state_dict()["student.text.embeddings.word_embeddings.weight"]
    assert torch.equal(found["decoder.embeddings.word_embeddings.weight"], table)
    assert torch.equal(
        found["decoder.cls.predictions.transform.dense.weight"],
        start.state_dict()["student.text.cls.predictions.transform.dense.weight"],
    )


def test_a_decoder_leaves_out_what_has_another_shape():
    """The images' width is not the text's: no MIM, and a cross-attention that reads other vectors."""
    wide = {"vision__width": 32, "vision__heads": 4}
    given = make_model(make_run(on=("itc", "itm", "mlm"), **wide)).state_dict()
    run = task_run(objectives__answers={"depth": 1}, text__max_positions=20, text__max_tokens=20, **wide)
    ours = Model(run, VOCAB).state_dict()
    found = decoder_start(ours, given)
    left = {name for name in ours if name.startswith("decoder.")} - set(found)
    layer = "decoder.encoder.layer.0.crossattention.self"
    assert left == {f"{layer}.{name}.weight" for name in ("key", "value")}
    query = "crossattention.self.query.weight"
    last = max(int(n.split(".")[4]) for n in given if n.startswith("student.text.encoder.layer."))
    assert torch.equal(found[f"decoder.encoder.layer.0.{query}"], given[f"student.text.encoder.layer.{last}.{query}"])
    positions = "embeddings.position_embeddings.weight"
    assert torch.equal(found[f"decoder.{positions}"], given[f"student.text.{positions}"][:20])

"""Official layout -> ours -> official layout, bit by bit; what has no place here is named."""

import pytest
import torch
from safetensors.torch import load_file

from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_strict
from simla_ray.models.model import Model
from simla_ray.models.official import ALBEF, SIMLA, TEMPERATURE, from_official, from_official_name, to_official

from .official_files import fine_tuned, golden_set, meta_of, official_run, official_state

SETS = ("simla_tiny", "simla_l4", "albef_tiny")
TYPES = "text_encoder.bert.embeddings.token_type_embeddings.weight"
POSITIONS = "text_encoder.bert.embeddings.position_embeddings.weight"


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
        assert ours[name].is_contiguous(), name


@pytest.mark.parametrize("name", SETS)
def test_pretraining_files_come_back_bit_by_bit(name):
    state = official_state(name)
    state["queue_ptr"] = torch.tensor([8])
    official = from_official(state)
    assert not any("decoder" in n or "position_ids" in n for n in official.tensors)
    assert_same(to_official(official.tensors, official.layout, official.aside), state)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("heads", [False, True])
def test_fine_tuned_files_come_back_bit_by_bit(name, heads):
    state = fine_tuned(official_state(name), heads=heads)
    official = from_official(state)
    assert official.ignored == (["text_decoder", "cls_head"] if heads else [])
    assert not official.layout.pretraining
    assert "student.text.encoder.layer.0.attention.self.query.weight" in official.tensors
    assert_same(to_official(official.tensors, official.layout, official.aside), state)


def test_half_precision_files_come_back_bit_by_bit():
    state = load_file(golden_set("albef_tiny") / "state_step0.safetensors")
    official = from_official(state)
    back = to_official(official.tensors, official.layout, official.aside)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in state.items())


@pytest.mark.parametrize("name", SETS)
def test_every_tensor_of_the_model_is_in_the_file_and_fits(name):
    run = official_run(name)
    model = Model(run, meta_of(name)["text_config"]["vocab_size"])
    tensors = from_official(official_state(name)).tensors
    load_strict(model, tensors | {"queue.ids": model.queue.ids}, golden_set(name))
    assert float(model.state_dict()[TEMPERATURE]) == pytest.approx(0.07)
    back = to_official(model.state_dict(), ALBEF if run.method == "albef" else SIMLA)
    assert back.keys() == official_state(name).keys()


def test_layouts():
    ours = from_official(official_state("simla_tiny")).tensors
    theirs = official_state("simla_tiny")
    assert ours["queue.image"].shape == theirs["image_queue"].shape[::-1]
    assert torch.equal(ours["queue.image"].T, theirs["image_queue"])
    assert from_official_name("visual_encoder_m.blocks.1.mlp.fc1.bias") == (
        "teacher.master.vision.vit.blocks.1.mlp.fc1.bias",
        False,
    )
    assert from_official_name("text_queue") == ("queue.text", True)
    assert from_official_name("queue_ptr") is None


def test_albefs_token_type_is_part_of_the_positions():
    """Whatever the word, the sum before the LayerNorm is the official one."""
    state = official_state("albef_tiny")
    ours = from_official(state).tensors
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"].double()
    official = words[7] + state[POSITIONS].double() + state[TYPES][0].double()
    folded = ours["student.text.embeddings.position_embeddings.weight"]
    torch.testing.assert_close(words[7] + folded.double(), official, rtol=0, atol=1e-6)
    assert state[TYPES][0].abs().max() > 1e-2  # or the test would show nothing
    assert torch.equal(folded, state[POSITIONS] + state[TYPES][0])


def test_albef_weights_of_ours_go_out_with_types_of_zeros_and_come_back():
    official = from_official(official_state("albef_tiny"))
    out = to_official(official.tensors, ALBEF)
    assert out[TYPES].shape == (2, 16) and not out[TYPES].any()
    again = from_official(out)
    assert_same(again.tensors, official.tensors)
    trained = dict(official.tensors)
    changed = "student.text.embeddings.position_embeddings.weight"
    trained[changed] = trained[changed] + 1
    out = to_official(trained, official.layout, official.aside)  # what was set aside is not the sum any more
    assert not out[TYPES].any() and torch.equal(out[POSITIONS], trained[changed])


def test_a_decoder_that_is_not_tied_is_refused():
    state = official_state("simla_tiny")
    state["text_encoder_m.cls.predictions.decoder.weight"] += 1
    with pytest.raises(UserError, match=r"1 \(text_encoder_m\.cls\.predictions\.decoder\.weight\)"):
        from_official(state)


def test_unknown_names_are_listed():
    state = official_state("simla_tiny") | {f"module.head{i}.weight": torch.zeros(1) for i in range(7)}
    with pytest.raises(UserError, match=r"7 \(module\.head0\.weight, .*module\.head4\.weight, \.\.\.\)"):
        from_official(state)


def test_what_has_no_official_name_is_listed():
    stem = {"student.vision.vit.patch_embed.stem.0.weight": torch.zeros(1), "scale.log_scale": torch.zeros(())}
    with pytest.raises(UserError, match=r"2 \(scale\.log_scale, student\.vision\.vit\.patch_embed\.stem"):
        to_official(stem, SIMLA)

"""Given weights in a model: whole heads may be absent, positions are made to fit, all else is one error."""

import pytest
import torch
import torch.nn.functional as F

from simla_ray.errors import UserError
from simla_ray.models.fit import IMAGE_POSITIONS, TEXT_POSITIONS, adapted, load_start, resize_positions, start_state

from .toy import make_model, make_run


def weights(**changes):
    return {n: t.clone() for n, t in make_model(make_run(**changes), seed=5).state_dict().items()}


def test_equal_runs_fit_without_a_word():
    model, given = make_model(make_run()), weights()
    teacher = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("teacher.")}
    assert load_start(model, given, "x") == []
    for name, tensor in start_state(model).items():
        assert torch.equal(tensor, given[name]), name
    assert all(torch.equal(model.state_dict()[n], t) for n, t in teacher.items())  # it is the caller's


def test_heads_of_one_side_only_are_notes():
    model = make_model(make_run())
    before = model.student.concept_head.weight.clone()
    notes = load_start(model, weights(on=("itc", "itm", "mlm")), "x")
    assert notes == [
        "vision.mask_token starts anew: x has none",
        "mim_head starts anew: x has none",
        "concept_head starts anew: x has none",
    ]
    assert torch.equal(model.student.concept_head.weight, before)
    notes = load_start(make_model(make_run(on=("itc", "itm"))), weights(), "x")
    assert "text.cls of x is left out: this run has none" in notes and len(notes) == 4


def test_all_that_does_not_fit_is_one_line():
    given = weights()
    for i in range(2):
        del given[f"student.text.encoder.layer.{i}.output.dense.weight"]
    del given["student.concept_head.bias"]
    given["student.vision.vit.blocks.9.norm1.weight"] = torch.zeros(16)
    given["student.text_proj.weight"] = torch.zeros(9, 16)
    with pytest.raises(UserError) as error:
        adapted(start_state(make_model(make_run())), given, "x")
    assert str(error.value) == (
        "x: does not fit this run; missing 3 (student.concept_head.bias, "
        "student.text.encoder.layer.0.output.dense.weight, student.text.encoder.layer.1.output.dense.weight); "
        "unknown 1 (student.vision.vit.blocks.9.norm1.weight); "
        "of another shape 1 (student.text_proj.weight (9, 16) for (8, 16)); see vision.depth, text.depth, joint_width"
    )


def test_long_lists_are_cut_and_counted():
    given = {name: tensor for name, tensor in weights().items() if ".vit." not in name}
    with pytest.raises(UserError, match=r"missing 30 \((student\.vision\.vit[^,]*, ){5}\.\.\.\)"):
        adapted(start_state(make_model(make_run())), given, "x")


def test_cross_attention_in_other_layers_is_no_lone_head():
    given = {n: t for n, t in weights().items() if "layer.0.crossattention" not in n}
    with pytest.raises(UserError, match=r"layer\.0\.crossattention.*see text\.fusion"):
        adapted(start_state(make_model(make_run())), given, "x")


def test_another_vocabulary_is_named():
    given = weights()
    for name in ("text.embeddings.word_embeddings.weight", "concept_head.weight", "concept_head.bias"):
        given[f"student.{name}"] = given[f"student.{name}"][:-3]
    given["student.text.cls.predictions.bias"] = given["student.text.cls.predictions.bias"][:-3]
    with pytest.raises(UserError, match=r"text\.vocab: the vocabulary has 40 word pieces, the weights know 37"):
        adapted(start_state(make_model(make_run())), given, "x")


def test_positions_are_made_to_fit():
    larger = make_model(make_run(vision__image_px=40, text__max_positions=30))
    given = weights(text__max_positions=40)
    notes = load_start(larger, given, "x")
    assert notes == [
        "image positions of x are resized from 3x3 to 5x5 patches",
        "of 40 text positions of x the first 30 are kept (text.max_positions)",
    ]
    state = larger.state_dict()
    assert torch.equal(state[IMAGE_POSITIONS], resize_positions(given[IMAGE_POSITIONS], 5))
    assert torch.equal(state[TEXT_POSITIONS], given[TEXT_POSITIONS][:30])
    with pytest.raises(UserError, match=r"position_embeddings\.weight \(26, 16\) for \(30, 16\).*text\.max_positions"):
        load_start(larger, weights(text__max_positions=26), "x")


def test_resizing_is_the_official_interpolation():
    positions = torch.randn(1, 17, 6)
    got = resize_positions(positions, 6)
    assert got.shape == (1, 37, 6)
    assert torch.equal(got[:, 0], positions[:, 0])
    for d in range(6):  # one channel at a time, as a picture
        picture = positions[0, 1:, d].reshape(1, 1, 4, 4)
        resized = F.interpolate(picture, size=(6, 6), mode="bicubic", align_corners=False)
        torch.testing.assert_close(got[0, 1:, d].reshape(6, 6), resized[0, 0])
    torch.testing.assert_close(resize_positions(positions, 4), positions)
    ramp = torch.cat([torch.zeros(1), torch.arange(4.0).repeat_interleave(4)]).view(1, 17, 1)
    rows = resize_positions(ramp, 8)[0, 1:, 0].view(8, 8)
    assert (rows.diff(dim=0) > 0).all() and rows.diff(dim=1).abs().max() < 1e-5  # rows stay rows
    with pytest.raises(UserError, match="no square grid"):
        resize_positions(torch.zeros(1, 12, 4), 4)


def test_half_precision_positions_keep_their_type():
    assert resize_positions(torch.zeros(1, 5, 4, dtype=torch.float16), 3).dtype == torch.float16

"""Official UNITER names: each has one place here, what is folded is folded, and others are refused."""

import pytest
import torch
from safetensors.torch import save_file

from simla_ray.errors import UserError
from simla_ray.models.official_uniter import from_official_uniter, is_uniter, uniter_name
from simla_ray.release.source import find_source

D, d = 4, 6
STATE = {
    "uniter.embeddings.position_embeddings.weight": torch.ones(3, D, dtype=torch.float16),
    "uniter.embeddings.token_type_embeddings.weight": torch.tensor([[0.5] * D, [2.0] * D], dtype=torch.float16),
    "uniter.img_embeddings.mask_embedding.weight": torch.stack([torch.zeros(d), torch.full((d,), 3.0)]),
    "uniter.img_embeddings.img_linear.weight": torch.rand(D, d),
    "cls.predictions.decoder.weight": torch.rand(5, D),
    "feat_regress.weight": torch.rand(D, d),
    "itm_output.bias": torch.rand(2),
}


def test_types_are_folded_and_tied_tensors_left_out():
    found = from_official_uniter(STATE)
    positions = found["student.text.embeddings.position_embeddings.weight"]
    assert positions.dtype == torch.float32 and positions.unique().tolist() == [1.5]
    assert found["student.vision.type_embedding"].tolist() == [2.0] * D
    assert found["student.vision.mask_embedding"].tolist() == [3.0] * d
    assert set(found) == {
        "student.text.embeddings.position_embeddings.weight", "student.vision.type_embedding", "itm_head.bias",
        "student.vision.mask_embedding", "student.vision.img_linear.weight",
    }  # fmt: skip


def test_strange_names_are_refused():
    with pytest.raises(UserError, match=r"not of an official UNITER file: .*vqa_output\.0\.weight"):
        from_official_uniter(STATE | {"vqa_output.0.weight": torch.rand(1)})
    with pytest.raises(KeyError):
        uniter_name("visual_encoder.cls_token")
    assert is_uniter(STATE) and not is_uniter({"text_encoder.bert.x": 0})


def test_a_file_is_a_start(tmp_path):
    save_file(STATE, tmp_path / "uniter.safetensors")
    weights = find_source(tmp_path / "uniter.safetensors").read()
    assert weights.layout is None and "itm_head.bias" in weights.tensors

"""Weights are found by what a path holds."""

import shutil

import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_tensors, save_tensors
from simla_ray.release.source import find_source, trained_model

from ..models.official_files import fine_tuned, official_state


def test_a_run_stands_for_its_best_checkpoint(run_folder):
    source = find_source(run_folder)
    assert source.file == run_folder / "checkpoints" / "step-00000010" / "model.safetensors"
    assert source.name == "mine" and source.summary()["steps"] == 20
    weights = source.read()
    assert weights.has_teacher and "queue.image" in weights.tensors
    model = trained_model(source.run, source.vocabulary(), weights, source.file)
    assert model.teacher is not None and model.queue is not None and not model.training
    assert all(torch.equal(model.state_dict()[n], t) for n, t in weights.tensors.items())


def test_a_checkpoint_and_an_export_are_sources_too(run_folder, exported):
    last = find_source(run_folder / "checkpoints" / "step-00000020")
    assert last.prepared == last.file.parent / "prepared" and last.summary() == {}
    assert last.manifest()["licenses"] == find_source(run_folder).manifest()["licenses"]
    source = find_source(exported)
    assert source.prepared == source.about == exported
    model = trained_model(source.run, source.vocabulary(), source.read(), source.file)
    assert model.teacher is None and model.queue is None


def test_reading_leaves_the_random_numbers_alone(exported):
    source = find_source(exported)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trained_model(source.run, source.vocabulary(), source.read(), source.file)
    assert torch.equal(torch.rand(2), expected)


def test_official_files_say_what_is_not_read(tmp_path):
    content = {"model": fine_tuned(official_state("simla_tiny"), heads=True), "optimizer": {}, "epoch": 3}
    torch.save(content, tmp_path / "vqa.pth")
    weights = find_source(tmp_path / "vqa.pth").read()
    assert weights.layout is not None and not weights.layout.pretraining
    assert weights.notes == [
        "text_decoder of vqa.pth is not read: it belongs to a fine-tuned task",
        "cls_head of vqa.pth is not read: it belongs to a fine-tuned task",
    ]
    save_tensors(content["model"], tmp_path / "vqa.safetensors")
    again = find_source(tmp_path / "vqa.safetensors").read()
    assert all(torch.equal(again.tensors[n], t) for n, t in weights.tensors.items())


def test_paths_without_weights(tmp_path, run_folder, exported):
    with pytest.raises(UserError, match="gone: no file, and no folder of a run or an export"):
        find_source(tmp_path / "gone")
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(run_folder / "config.yaml", young)
    with pytest.raises(UserError, match="young: holds no complete checkpoint"):
        find_source(young)
    with pytest.raises(UserError, match=r"holds weights under our names; give the folder it lies in"):
        find_source(exported / "model.safetensors").read()
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: not of an official SIMLA or ALBEF file: 1 \(w\)"):
        find_source(tmp_path / "other.pth").read()
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"noise\.safetensors: not a readable safetensors file"):
        find_source(tmp_path / "noise.safetensors").read()


def test_missing_unknown_and_misshapen_weights_are_listed(tmp_path, exported):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    tensors = load_tensors(exported / "model.safetensors")
    del tensors["itm_head.bias"]
    tensors["itm_head.weight"] = torch.zeros(3, 64)
    tensors["extra"] = torch.zeros(1)
    save_tensors(tensors, broken / "model.safetensors")
    source = find_source(broken)
    with pytest.raises(UserError) as error:
        trained_model(source.run, source.vocabulary(), source.read(), source.file)
    assert "missing 1 (itm_head.bias); unknown 1 (extra); of another shape 1 (itm_head.weight (3, 64)" in str(
        error.value
    )

"""init_from: runs, exported folders, official files; what does not fit is said before Ray starts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from simla_ray.config.load import load_run
from simla_ray.data.text import Vocabulary, build_vocabulary
from simla_ray.errors import UserError
from simla_ray.models.official import from_official
from simla_ray.orchestration import cli
from simla_ray.orchestration.manifest import fallbacks
from simla_ray.orchestration.prepare import Prepared
from simla_ray.orchestration.start import describe, find_start, prepared_of_start
from simla_ray.orchestration.worker import build_losses
from simla_ray.release.export import export
from simla_ray.release.source import find_source

from ..models.official_files import fine_tuned, official_run, official_state, word_pieces
from ..release.conftest import make_run_folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("Ray was started for a mistake that could be seen without it")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path, vocabulary):
    """A run by name, and its export."""
    folder, _ = make_run_folder(tmp_path / "runs" / "first", vocabulary, torch.rand(128, 192))
    export(find_source(folder), tmp_path / "exported")
    return tmp_path


def build(run, vocabulary, folder):
    vocabulary.save(folder)
    run = run.model_copy(update={"objectives": run.objectives.model_copy(update={"mim": None})})  # no codes needed
    return build_losses(run, Prepared(folder, {}, vocabulary), CPU).model


def pth(path, state):
    torch.save({"model": state, "config": torch.device("cpu"), "epoch": 29}, path)
    return path


def test_a_run_by_name_and_its_export_start_a_run_alike(runs, vocabulary):
    models = []
    for i, start in enumerate(("first", "runs/first", "exported")):
        found = find_start(Path(start), Path("runs"))
        assert found.is_absolute()
        run = load_run(overrides={"init_from": str(found), "seed": 7})
        assert (prepared_of_start(run) / "tokenizer.json").is_file()
        models.append(build(run, vocabulary, runs / f"prepared{i}"))
    best = find_source(runs / "runs" / "first").read().tensors
    for model in models:
        state = model.state_dict()
        for name in ("student.vision.vit.pos_embed", "itm_head.weight", "scale.temperature"):
            assert torch.equal(state[name], best[name]), name
        for name, tensor in model.student.state_dict().items():
            assert torch.equal(model.teacher.master.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["simla_tiny", "albef_tiny"])
def test_an_official_file_starts_a_run(name, tmp_path):
    path = pth(tmp_path / "official.pth", official_state(name))
    pieces = word_pieces(name, tmp_path / "vocab.txt")
    run = official_run(name, init_from=str(path), text__vocab=str(pieces))
    vocabulary = build_vocabulary((), run.text)
    model = build(run, vocabulary, tmp_path / "prepared")
    expected = from_official(official_state(name)).tensors
    for ours, tensor in model.state_dict().items():
        if ours.startswith(("student.", "itm_head.", "scale.")):
            assert torch.equal(tensor, expected[ours]), ours
    assert prepared_of_start(run) is None
    assert "towers: start from official.pth in place of DeiT-B and bert-base-uncased" in fallbacks(run)


def test_an_official_file_from_other_pictures_is_resized_and_noted(tmp_path):
    path = pth(tmp_path / "retrieval.pth", fine_tuned(official_state("simla_tiny"), heads=True))
    pieces = word_pieces("simla_tiny", tmp_path / "vocab.txt")
    run = official_run("simla_tiny", init_from=str(path), text__vocab=str(pieces), vision__image_px=32)
    notes = describe(run)["notes"]
    assert "image positions of retrieval.pth are resized from 3x3 to 2x2 patches" in notes
    assert "cls_head of retrieval.pth is not read: it belongs to a fine-tuned task" in notes
    assert "concept_head starts anew: retrieval.pth has none" in notes


def test_a_mim_head_for_other_codes_is_not_taken(tmp_path):
    path = pth(tmp_path / "official.pth", official_state("simla_tiny"))
    pieces = word_pieces("simla_tiny", tmp_path / "vocab.txt")
    notes = describe(official_run("simla_tiny", init_from=str(path), text__vocab=str(pieces)))["notes"]
    assert notes == [
        "1 kinds of objects in official.pth are left unread: torch.device",
        "mim_head of official.pth predicts dvae codes, not kmeans ones",
        "mim_head starts anew: official.pth has none",
    ]


def test_the_manifest_of_the_start_goes_along(runs):
    start = describe(load_run(overrides={"init_from": str(runs / "runs" / "first")}))
    assert start["name"] == "first" and start["notes"] == []
    assert start["manifest"]["licenses"] == ["CC-BY-4.0", "CC0 | 1.0"]
    assert "/home" not in json.dumps(start)
    assert describe(load_run()) is None


def files(world_files):
    return [f"data.{s}=[{world_files / s}.parquet]" for s in ("train", "val")]


def test_dry_run_says_what_a_start_does(capsys, runs, world_files):
    code = cli.pretrain_main(["--dry-run", "--init-from", "first", *files(world_files), "objectives.psl=null",
                              "schedule.kind=joint", "schedule.phases=[]"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "start      from first\n" in out
    assert "start      concept_head of first is left out: this run has none" in out


def mistakes(tmp_path):
    """name -> (arguments, message)"""
    state = official_state("simla_tiny")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    pth(tmp_path / "official.pth", state)
    pieces = word_pieces("simla_tiny", tmp_path / "vocab.txt")
    fits = official_run("simla_tiny", text__vocab=str(pieces))
    keys = [f"vision.{k}={getattr(fits.vision, k)}" for k in ("image_px", "patch_px", "width", "depth", "heads")]
    keys += [f"text.{k}={getattr(fits.text, k)}" for k in ("width", "depth", "heads", "ffn")]
    keys += ["vision.stem=patch", "vision.mlp_ratio=4", "text.max_positions=16", "text.max_tokens=16", "joint_width=8"]
    official = ["--init-from", str(tmp_path / "official.pth"), *keys]
    broken = {n: t for n, t in state.items() if n != "visual_encoder.norm.bias"} | {
        "visual_encoder.head.weight": torch.zeros(2), "itm_head.bias": torch.zeros(3)
    }  # fmt: skip
    pth(tmp_path / "broken.pth", broken)
    return {
        "nothing there": (["--init-from", "gone"], "gone: no run there"),
        "no checkpoint": (["--init-from", str(tmp_path / "text.pth")], "text.pth: no checkpoint that can be read"),
        "no tensors": (
            ["--init-from", str(tmp_path / "other.pth")],
            "other.pth: no checkpoint that can be read (it holds",
        ),
        "trained vocabulary": (official, "text.vocab: train makes new word ids, which the weights of official.pth"),
        "another size": (
            [*official, f"text.vocab={pieces}", "text.width=64", "text.heads=4", "vision.width=64"],
            "of another shape",
        ),
        "missing, unknown, misshapen": (
            [*official, f"text.vocab={pieces}", "--init-from", str(tmp_path / "broken.pth")],
            "init_from: broken.pth: does not fit this run; missing 1 (student.vision.vit.norm.bias); unknown 1 "
            "(student.vision.vit.head.weight); of another shape 1 (itm_head.bias (3,) for (2,))",
        ),
    }


def test_mistakes_are_one_line(capsys, tmp_path, world_files):
    for name, (arguments, message) in mistakes(tmp_path).items():
        assert cli.pretrain_main([*arguments, *files(world_files), "--dry-run"]) == 2, name
        error = capsys.readouterr().err
        assert message in error, name
        assert len(error.splitlines()) == 1, name
        assert cli.pretrain_main([*arguments, *files(world_files)]) == 2, name
        assert message in capsys.readouterr().err, name
    assert not (tmp_path / "runs").exists()


def test_a_vocabulary_of_another_size_is_named(tmp_path):
    path = pth(tmp_path / "official.pth", official_state("simla_tiny"))
    pieces = word_pieces("simla_tiny", tmp_path / "vocab.txt")
    with pieces.open("a") as file:
        file.write("\nmore")
    with pytest.raises(UserError, match=r"init_from: official\.pth.*text\.vocab: the vocabulary has 161 word pieces"):
        describe(official_run("simla_tiny", init_from=str(path), text__vocab=str(pieces)))


def test_a_run_that_has_begun_needs_no_start_any_more(tmp_path, vocabulary):
    run = load_run(overrides={"init_from": str(tmp_path / "gone"), "objectives.mim": None, "schedule.kind": "joint",
                              "schedule.phases": []})  # fmt: skip
    vocabulary.save(tmp_path / "prepared")
    prepared = Prepared(tmp_path / "prepared", {}, Vocabulary.load(tmp_path / "prepared"))
    assert build_losses(run, prepared, CPU, fresh=False).model is not None
    with pytest.raises(UserError, match="gone"):
        build_losses(run, replace(prepared), CPU, fresh=True)

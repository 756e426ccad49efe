"""experiments/export.py: runs and official files as folders that simla_ray.load opens."""

import json

import pytest
import torch

import simla_ray
from simla_ray.evaluation.scorer import Scorer
from simla_ray.models.fit import load_start
from simla_ray.models.official import from_official
from simla_ray.orchestration import cli
from simla_ray.release.source import empty_model, without_teacher

from ..models.official_files import fine_tuned, official_run, official_state, word_pieces
from ..release.conftest import make_run_folder

PX = 48


@pytest.fixture(scope="module")
def storage(tmp_path_factory, vocabulary):
    storage = tmp_path_factory.mktemp("runs")
    make_run_folder(storage / "mine", vocabulary, torch.rand(128, 192))
    return storage


def say(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_run_is_exported_by_name(capsys, storage, tmp_path, world_rows):
    assert cli.export_main(["mine", "--storage", str(storage)]) == 0
    out, _ = say(capsys)
    assert f"exported   {storage}/mine/export" in out
    picture = world_rows["test"][0]["image"]
    vector = simla_ray.load(storage / "mine" / "export").encode_image(picture)
    assert cli.export_main([str(storage / "mine"), str(tmp_path / "ema"), "--teacher"]) == 0
    assert not torch.equal(simla_ray.load(tmp_path / "ema").encode_image(picture), vector)


def test_an_export_is_evaluated_like_a_run(capsys, storage, tmp_path, world_files):
    assert cli.export_main(["mine", str(tmp_path / "out"), "--storage", str(storage)]) == 0
    results = []
    for path in (storage / "mine", tmp_path / "out"):
        say(capsys)
        command = [str(path), "retrieval", "match", "--data", f"{world_files}/test.parquet", "--json"]
        assert cli.evaluate_main(command) == 0
        results.append(json.loads(say(capsys)[0]))
    assert results[0] == results[1] and results[0]["data"]["n_images"] == 48


MISTAKES = {
    "no run": (["nobody", "OUT"], "nobody: no run there"),
    "two folders": (["mine", "a", "b"], "a b: give one folder to export to"),
    "keys of a run": (["mine", "OUT", "text.vocab=x"], "text.vocab=x: a run brings its config"),
    "taken": (["mine", "."], "is there already"),
    "stem": (["mine", "OUT", "--layout", "official"], "--layout: no place in the official layout for 8 ("),
    "file without a folder": (["FILE"], "of a file, give the folder to export to"),
    "no checkpoint": (["FILE", "OUT"], "no checkpoint that can be read"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, capsys, storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("not weights")
    arguments, message = MISTAKES[name]
    assert cli.export_main([*arguments, "--storage", str(storage)]) == 2
    out, error = say(capsys)
    assert message in error and len(error.splitlines()) == 1 and out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"]


def as_file(path, state):
    torch.save({"model": state, "epoch": 29}, path)
    return str(path)


def keys(name, pieces):
    run = official_run(name)
    found = [f"vision.{k}={getattr(run.vision, k)}" for k in ("width", "depth", "heads")]
    found += [f"text.{k}={getattr(run.text, k)}" for k in ("width", "depth", "heads", "ffn")]
    return [*found, "text.max_positions=16", "text.max_tokens=16", "joint_width=8", f"text.vocab={pieces}"]


@pytest.mark.parametrize("name", ["simla_tiny", "albef_tiny"])
def test_an_official_file_becomes_a_folder(capsys, name, tmp_path, world_rows):
    pieces = word_pieces(name, tmp_path / "vocab.txt")
    state = official_state(name)
    assert cli.export_main([as_file(tmp_path / "w.pth", state), str(tmp_path / "out"), *keys(name, pieces)]) == 0
    out, _ = say(capsys)
    assert ("mim_head of w.pth is left out: this run has none" in out) == (name == "simla_tiny")
    model = simla_ray.load(tmp_path / "out")
    assert str(model.run.method) == name.removesuffix("_tiny") and model.run.vision.image_px == PX
    pictures, texts = [row["image"] for row in world_rows["test"][:3]], ["ab c", "d", "e f g h"]

    run = official_run(name, objectives__mim=None)
    expected = empty_model(without_teacher(run), len(model.vocabulary))
    load_start(expected, from_official(state).tensors, "w")
    scorer = Scorer(model.run, expected, model.vocabulary, torch.device("cpu"))
    assert torch.equal(model.encode_text(texts), scorer.encode_texts(texts)[2])
    assert model.match(pictures, texts).shape == (3,) and model.ground(pictures, texts).shape == (3, 3, 3)
    if name == "simla_tiny":
        words = {word for word, _ in model.keywords(pictures[:1], top_k=30)[0]}
        assert words and words < set("bcdefghijklmnopqrstuvwxyz")  # whole words of the vocabulary, no stop words
    card = (tmp_path / "out" / "README.md").read_text()
    assert "w.pth, a file in the layout of the official code" in card and "Their authors say" in card


def test_a_fine_tuned_file_has_no_heads_of_pretraining(capsys, tmp_path, world_rows):
    pieces = word_pieces("simla_tiny", tmp_path / "vocab.txt")
    path = as_file(tmp_path / "retrieval.pth", fine_tuned(official_state("simla_tiny"), heads=True))
    assert cli.export_main([path, str(tmp_path / "out"), *keys("simla_tiny", pieces)]) == 0
    assert "note       cls_head of retrieval.pth is not read" in say(capsys)[0]
    model = simla_ray.load(tmp_path / "out")
    assert list(model.run.objectives.active()) == ["itc", "itm"]
    assert model.match(world_rows["test"][0]["image"], "a").shape == (1,)


def test_a_file_that_does_not_fit_its_keys_leaves_nothing(capsys, tmp_path):
    pieces = word_pieces("simla_tiny", tmp_path / "vocab.txt")
    path = as_file(tmp_path / "w.pth", official_state("simla_tiny"))
    wrong = [path, str(tmp_path / "out"), *keys("simla_tiny", pieces), "text.depth=3", "joint_width=9"]
    assert cli.export_main(wrong) == 2
    error = say(capsys)[1]
    assert "unknown 234 (" in error and "of another shape 5 (" in error and len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocab.txt", "w.pth"]

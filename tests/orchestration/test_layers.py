"""--layers of evaluate.py: all reproduces, auto chooses on validation and never on what is evaluated."""

import json

import pytest
import torch

from simla_ray.orchestration import cli
from simla_ray.orchestration.layers import numbers_of

from ..release.conftest import make_run_folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory, vocabulary, world_files):
    storage = tmp_path_factory.mktemp("runs")
    data = {"data__train": [str(world_files / "train.parquet")], "data__val": [str(world_files / "val.parquet")]}
    make_run_folder(storage / "mine", vocabulary, torch.rand(128, 192), **data)
    tested = data | {"data__test": [str(world_files / "test.parquet")]}
    make_run_folder(storage / "tested", vocabulary, torch.rand(128, 192), **tested)
    make_run_folder(storage / "clip", vocabulary, method="clip", queue=0, **data)
    return storage


def evaluate(storage, capsys, *arguments, run="tested", task="grounding"):
    capsys.readouterr()
    assert cli.evaluate_main([run, task, "--storage", str(storage), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out).get("grounding")


def test_all_is_the_default(storage, capsys):
    assert evaluate(storage, capsys) == evaluate(storage, capsys, "--layers", "all")
    assert evaluate(storage, capsys)["layers"] == [0, 1, 2]
    some = evaluate(storage, capsys, "--layers", "2,0")
    assert some["layers"] == [0, 2] and "pointing_on_validation" not in some


def test_auto_takes_what_points_best_on_validation(storage, world_files, capsys):
    found = evaluate(storage, capsys, "--layers", "auto")
    scores = found["pointing_on_validation"]
    assert list(scores) == ["0, 1, 2", "0", "1", "2"]
    best = max(scores, key=lambda name: scores[name])
    assert found["layers"] == [int(part) for part in best.split(",")]
    # the scores are those of the validation rows, the result is that of the test rows
    for name, pointing in (("val", scores[best]), ("test", found["pointing"])):
        command = ["--data", str(world_files / f"{name}.parquet"), "--layers", best.replace(" ", "")]
        assert evaluate(storage, capsys, *command)["pointing"] == pointing


def test_auto_never_chooses_on_what_is_evaluated(storage, world_files, capsys):
    for run, data in (("tested", ["--data", str(world_files / "val.parquet")]), ("mine", [])):  # without test: val
        assert cli.evaluate_main([run, "grounding", "--layers", "auto", "--storage", str(storage), *data]) == 2
        error = capsys.readouterr().err
        assert "--layers: auto would choose on the rows that are evaluated" in error and len(error.splitlines()) == 1
    assert evaluate(storage, capsys, "--layers", "auto", task="match") is None  # where nobody asks for layers


def test_a_run_without_itm_has_no_grounding(storage, capsys):
    assert evaluate(storage, capsys, "--layers", "auto", run="clip", task="retrieval") is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("7", "layers: 7 does not read the image; those that do: 0, 1, 2"),
        ("best", "--layers: best; give all, auto, or numbers from 0 such as 5,8"),
        ("1;2", "--layers: 1;2; give all, auto"),
        ("", "--layers: ; give all"),
    ],
)
def test_bad_layers_are_one_line(layers, message, storage, capsys):
    assert cli.evaluate_main(["tested", "grounding", "--layers", layers, "--storage", str(storage)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_numbers():
    assert numbers_of("all") is None and numbers_of("5") == (5,) and numbers_of("5, 8") == (5, 8)

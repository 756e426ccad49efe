"""The command line of fine-tuning: what it resolves to, and mistakes in one line, before any Ray."""

import pytest
import yaml

from simla_ray.orchestration.finetune import finetune_main
from tests.release.conftest import make_run_folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, vocabulary):
    return make_run_folder(tmp_path_factory.mktemp("runs") / "start", vocabulary)[0]


def test_a_run_by_name_and_a_task_make_a_config(start, capsys):
    words = ["start", "task=entailment", "--storage", str(start.parent), "--print-config", "seed=3"]
    assert finetune_main(words) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["task"], config["seed"], config["init_from"]) == ("entailment", 3, str(start))
    assert config["objectives"]["labels"]["classes"] == ["entailment", "neutral", "contradiction"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task=vqa"], "RUN: give one run to start from, found none"),
        (["start", "other", "task=vqa"], "RUN: give one run to start from, found start other"),
        (["nothing", "task=vqa"], "nothing: no run there; under"),
        (["start"], "task: missing one of retrieval, grounding, vqa"),
        (["start", "task=vqa", "objectives.answers.head=both"], "objectives.answers.head: input should be 'decoder'"),
        (["start", "task=vqa", "data.train=[none.parquet]", "data.val=[none.parquet]"], "data.train: none.parquet"),
    ],
)
def test_mistakes_are_one_line(start, capsys, words, said):
    assert finetune_main([*words, "--storage", str(start.parent)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {said}")

"""The command line: plans, refusals. Every mistake is plain lines and exit code 2, before Ray starts."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from simla_ray.config.load import load_run, to_yaml
from simla_ray.orchestration import cli, launch
from simla_ray.orchestration.preflight import check
from simla_ray.orchestration.runs import fresh_name


@pytest.fixture(autouse=True)
def no_ray(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("Ray was started for a mistake that could be seen without it")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def files(world_files):
    return [f"data.{s}=[{world_files / s}.parquet]" for s in ("train", "val")]


def test_print_config_is_the_run(capsys):
    assert cli.pretrain_main(["optim.lr=0.5", "--print-config", "--size", "small", "seed=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 0.5
    assert printed["size"] == "small"
    assert printed["seed"] == 3


def test_dry_run_says_the_plan_and_trains_nothing(capsys, world_files, tmp_path):
    assert (
        cli.pretrain_main(["--dry-run", *files(world_files), "optim.max_steps=null", "optim.epochs=2", "--name", "n"])
        == 0
    )
    out = capsys.readouterr().out
    assert "train: 96 rows in 6 row groups" in out
    assert "64 pairs = 2 micro-batches of 32, 1 on each of 2 workers; 31 negatives per query" in out
    assert "steps      3 = 192 pairs" in out
    assert "nothing was trained" in out
    assert not (tmp_path / "runs").exists()


def test_two_towers_say_their_negatives_and_what_is_not_clips(capsys, world_files):
    assert cli.pretrain_main(["--dry-run", "--method", "clip", *files(world_files)]) == 0
    out = capsys.readouterr().out
    assert "63 negatives per query" in out and "in place of CLIP's" in out and "DeiT" not in out


def test_words_are_not_taken_for_folders_of_that_name(tmp_path, world_files):
    (tmp_path / "train").mkdir()
    (tmp_path / "en").mkdir()
    run, _ = check(load_run(overrides=files(world_files)))
    assert run.text.vocab == "train"
    assert run.objectives.psl.stop_words == "en"


def test_paths_of_a_run_do_not_depend_on_where_it_was_started(tmp_path, world_files, monkeypatch):
    monkeypatch.chdir(world_files)
    run, indexes = check(load_run(overrides=["data.train=[train.parquet]", "data.val=['val.*']"]))
    assert run.data.train == [str(world_files / "train.parquet")]
    assert run.data.val == [str(world_files / "val.*")]
    assert len(indexes["test"]) == len(indexes["val"]) == 48


def test_dry_run_refuses_a_changed_run(capsys, tmp_path, world_files):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(check(load_run(overrides=["name=mine", *files(world_files)]))[0]))
    assert cli.pretrain_main(["--dry-run", "--name", "mine", *files(world_files)]) == 0
    assert cli.pretrain_main(["--dry-run", "--name", "mine", *files(world_files), "seed=1"]) == 2
    assert "seed: the run has 0, now 1" in capsys.readouterr().err


def test_dry_run_of_the_default(capsys):
    assert cli.pretrain_main(["--dry-run"]) == 0
    assert "the built-in world would be generated: 12000 train" in capsys.readouterr().out


BAD = {
    "unknown key": (["optim.learning_rate=1"], "optim.learning_rate: unknown key"),
    "suggestion": (["optim.weight_decya=1"], "did you mean optim.weight_decay?"),
    "wrong type": (["optim.lr=fast"], "optim.lr: input should be a valid number"),
    "micro of 1": (["batch.micro=1"], "batch.micro: 1 leaves no negatives"),
    "hard without threshold": (["objectives.psl.recommend=hard"], "objectives.psl.recommend: hard needs"),
    "unknown method": (["--method", "simlaa"], "method: simlaa is not one of simla"),
    "missing file": (
        ["data.train=[gone.parquet]", "data.val=[gone.parquet]"],
        "data.train: gone.parquet does not exist",
    ),
    "missing weights": (["vision.weights=gone.pth"], "vision.weights: gone.pth does not exist"),
    "missing config": (["--config", "gone.yaml"], "gone.yaml: cannot be read"),
    "no such world": (["data.train=['world:dev']"], "data.train: world:dev is not one of"),
    "world and files": (["data.train=[a.parquet]"], "must both be the built-in world, or neither"),
    "small world": (["world.n_train=10"], "world.n_train: 10 scenes are less than one step takes"),
    "too few decoders": (["data.decode_cpus=1"], "data.decode_cpus: 1 is less than one for each of ray.workers=2"),
    "no gpu": (["ray.device=gpu"], "ray.device: gpu, but this machine has 0 usable GPUs"),
    "bad name": (["--name", "../up"], "name: string should match pattern"),
    "not an override": (["lr"], "lr: not an override"),
    "no such run": (["--init-from", "nobody"], "nobody: no run there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, capsys, tmp_path):
    arguments, message = BAD[case]
    if case == "no gpu":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    assert cli.pretrain_main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("error:") == len(error.splitlines())
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/config.yaml"))


def table(path, rows, **columns):
    base = {"uid": [str(i) for i in range(rows)], "image": [b""] * rows, "captions": [["a"]] * rows}
    pq.write_table(pa.table({n: v for n, v in (base | columns).items() if v is not None}), path)
    return str(path)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (dict(rows=80, image=None), dict(rows=40), "no column image"),
        (dict(rows=80, captions=None), dict(rows=40), "no column captions"),
        (dict(rows=0), dict(rows=40), "data.train: "),
        (dict(rows=80), dict(rows=20), "data.val: 20 rows are less than one micro-batch (batch.micro=32)"),
        (dict(rows=50), dict(rows=40), "data.train: 50 rows are less than one step takes (batch.global=64)"),
        (dict(rows=80, image=["a"] * 80), dict(rows=40), "column image is string; allowed: binary"),
        (dict(rows=80, captions=[[1]] * 80), dict(rows=40), "column captions is list<element: int64>; allowed: text"),
    ],
)
def test_bad_data_is_one_clear_line(train, val, message, capsys, tmp_path):
    uris = [
        f"data.train=[{table(tmp_path / 't.parquet', **train)}]",
        f"data.val=[{table(tmp_path / 'v.parquet', **val)}]",
    ]
    assert cli.pretrain_main(uris) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_finished_run_gives_its_summary(capsys, tmp_path):
    folder = tmp_path / "runs" / "done"
    folder.mkdir(parents=True)
    run = load_run(overrides=["name=done"])
    (folder / "config.yaml").write_text(to_yaml(run))
    (folder / "summary.json").write_text(json.dumps({"name": "done", "steps": 3}))
    assert launch.pretrain(run, lambda _: None) == {"name": "done", "steps": 3}


def test_another_identity_key_is_refused_with_the_difference(capsys, tmp_path, world_files):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_run(overrides=["name=mine", *files(world_files)])))
    changed = ["--name", "mine", *files(world_files), "optim.lr=0.5", "seed=1", "log.every_steps=3"]
    assert cli.pretrain_main(changed) == 2
    error = capsys.readouterr().err
    assert "optim.lr: the run has 0.004, now 0.5" in error
    assert "seed: the run has 0, now 1" in error
    assert "log.every_steps" not in error


def test_fresh_names_count_up(tmp_path):
    run = load_run()
    assert fresh_name(run) == "simla-tiny-kmeans128-001"
    (tmp_path / "runs" / "simla-tiny-kmeans128-007").mkdir(parents=True)
    assert fresh_name(run) == "simla-tiny-kmeans128-008"


def test_evaluate_needs_a_run(capsys):
    assert cli.evaluate_main(["nobody"]) == 2
    assert "nobody: no run there" in capsys.readouterr().err

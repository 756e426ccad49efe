"""Whole runs through Ray: worker counts, repetition, kills, drops. Real workers, real files, real SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data import world
from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.orchestration.cli import evaluate_main
from simla_ray.orchestration.launch import pretrain
from simla_ray.orchestration.preflight import check
from simla_ray.orchestration.prepare import load_tokenizer, prepare
from simla_ray.orchestration.runs import load_trained
from simla_ray.orchestration.worker import build_losses
from tests.ray.alone import losses_alone, losses_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STEPS = 26


@pytest.fixture(scope="module")
def data(tmp_path_factory, world_rows):
    """97 training rows, two of them unusable; an odd number, so that lanes and epochs do not come out even."""
    folder = tmp_path_factory.mktemp("data")
    rows = [dict(r) for r in world_rows["train"]] + [world.make_row(0, "train", 96, 48, 3)]
    rows[5]["image"] = b"not an image"
    rows[40]["captions"] = ["...", ""]
    pq.write_table(pa.Table.from_pylist(rows, schema=world.SCHEMA), folder / "train.parquet", row_group_size=16)
    pq.write_table(pa.Table.from_pylist(world_rows["val"], schema=world.SCHEMA), folder / "val.parquet")
    return folder


def overrides(data: Path, storage: Path, name: str, workers: int) -> list[str]:
    return [
        f"name={name}", f"storage={storage}", f"data.train=[{data}/train.parquet]", f"data.val=[{data}/val.parquet]",
        "data.audit=true", "data.shuffle_window=40", "batch.micro=8", "batch.global=16", f"ray.workers={workers}",
        "text.dropout=0.1",
        "vision.width=32", "text.width=32", "text.ffn=64", "joint_width=16", "codes.n=16", "codes.fit_images=40",
        "optim.warmup_steps=4",
        f"optim.max_steps={STEPS}", "checkpoint.every_steps=8", "eval.every_steps=8", "eval.batches=2",
        "eval.pairs=24", "eval.rerank_top_k=4", "log.every_steps=2", "queue=32", "ray.device=cpu",
        "schedule.phases=[{until: 0.2, objectives: [itc, psl]}, {until: 1.0, objectives: [itc, itm, mlm, mim, psl]}]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two_workers(ray_session, data, tmp_path_factory):
    storage = tmp_path_factory.mktemp("two")
    said: list[str] = []
    summary = pretrain(load_run(overrides=overrides(data, storage, "two", 2)), said.append)
    return storage / "two", summary, said


def test_two_workers_give_the_losses_of_one(two_workers, data, tmp_path):
    """Of one that never validated, in a process without Ray Train."""
    run, _ = check(load_run(overrides=overrides(data, tmp_path, "one", 1)))
    one, two = losses_alone(run, two_workers[0] / "prepared", tmp_path / "one"), losses_of(two_workers[0])
    assert len(one) == len(two) == STEPS
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5), f"step {step} {name}"


def test_every_sample_once_per_epoch_and_drops_named(two_workers, world_rows):
    folder, summary, _ = two_workers
    consumed = read_lines(folder / "consumed.jsonl")
    assert len(consumed) == STEPS * 16
    times = Counter((line["epoch"], line["uid"]) for line in consumed)
    assert set(times.values()) == {1}
    expected = {f"world-train-{i:06d}" for i in range(97)} - {"world-train-000005", "world-train-000040"}
    for epoch in range(4):  # 26 steps of 16 are more than four epochs of 95
        assert {uid for e, uid in times if e == epoch} == expected
    assert {line["rank"] for line in consumed} == {0, 1}
    dropped = {(line["uid"], line["reason"]) for line in read_lines(folder / "dropped.jsonl")}
    assert dropped == {("world-train-000005", "image_unreadable"), ("world-train-000040", "caption_empty")}
    assert summary["dropped"] == {"caption_empty": 1, "image_unreadable": 1}


def test_the_folder_holds_everything(two_workers):
    folder, summary, said = two_workers
    for name in (
        "config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "dropped.jsonl", "summary.json", "report.html",
        "evaluation.json", "prepared/tokenizer.json", "prepared/codes.safetensors",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").glob("events.*"))
    assert 1 <= len(list((folder / "checkpoints").glob("step-*"))) <= 4
    assert said[0].startswith("cluster")
    assert any("16 pairs = 2 micro-batches of 8, 1 on each of 2 workers; 39 negatives" in line for line in said)
    assert any(line.startswith(f"step {STEPS}/{STEPS}") for line in said)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["train"]["rows"] == 97
    assert manifest["licenses"] == ["CC0-1.0"]
    assert manifest["packages"]["ray"]
    for key in ("name", "label", "steps", "epochs", "samples_seen", "seconds", "pairs_per_s", "data_wait_fraction",
                "world_size", "restarts", "best_step", "dropped", "losses", "eval"):  # fmt: skip
        assert key in summary, key
    assert set(summary["losses"]) == {"itc", "itm", "mlm", "mim", "psl"}
    assert {"retrieval", "match", "grounding", "keywords", "words"} <= set(summary["eval"])
    assert json.loads((folder / "summary.json").read_text()) == summary
    validations = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "val"]
    assert [line["step"] for line in validations] == [8, 16, 24, STEPS]
    assert {"itc_hard", "itm_hard", "mlm_hard", "mim_hard", "psl_hard", "retrieval_r10"} <= set(
        validations[0]["metrics"]
    )


def test_evaluate_on_demand_gives_the_same_numbers(two_workers, capsys):
    """In one process those of two workers, which had half of the rows each."""
    folder, summary, _ = two_workers
    assert evaluate_main([str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == summary["eval"]
    assert evaluate_main([str(folder), "retrieval", "nonsense"]) == 2


def test_killed_in_mid_epoch_it_goes_on_as_if_nothing_had_happened(ray_session, data, two_workers, tmp_path):
    """SIGKILL of the driver's process group, then the same command."""
    folder = tmp_path / "killed"
    environment = os.environ | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    command = [sys.executable, str(ROOT / "experiments" / "pretrain.py"), *overrides(data, tmp_path, "killed", 2)]
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and driver.poll() is None:
        lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
        if lines and lines[-1]["step"] >= 10:
            break
        time.sleep(0.02)
    assert driver.poll() is None, "the run ended before it could be killed"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # the cluster notices that the driver is gone and ends its workers
    assert not (folder / "summary.json").exists()

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] == 1
    resumed = [e for e in read_lines(folder / "events.jsonl") if e["event"] == "resume"]
    assert resumed[0]["step"] in (8, 16, 24)
    assert losses_of(folder) == losses_of(two_workers[0])
    ours, theirs = (read_lines(f / "consumed.jsonl") for f in (folder, two_workers[0]))
    key = lambda line: (line["step"], line["lane"], line["epoch"], line["uid"])  # noqa: E731
    assert sorted(map(key, ours)) == sorted(map(key, theirs))
    assert summary["dropped"] == {"caption_empty": 1, "image_unreadable": 1}

    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0
    assert "is finished" in finished.stdout


def test_init_from_starts_with_the_best_weights_of_the_run(ray_session, data, two_workers, tmp_path):
    source, summary, _ = two_workers
    run, _ = check(load_run(overrides=[*overrides(data, tmp_path, "next", 1), f"init_from={source}", "seed=1"]))
    prepared = prepare(run, tmp_path / "prepared", 1)
    model = build_losses(run, prepared, torch.device("cpu")).model
    _, trained, vocabulary_folder = load_trained(source)
    assert json.loads((vocabulary_folder.parent / "state.json").read_text())["step"] == summary["best_step"]
    for name, tensor in trained.student.state_dict().items():
        assert torch.equal(model.student.state_dict()[name], tensor), name
        assert torch.equal(model.teacher.master.state_dict()[name], tensor), name


def test_codes_over_the_features_of_an_earlier_run(ray_session, data, two_workers, tmp_path):
    source, _, _ = two_workers
    features = ["codes.kind=features", f"codes.source={source}", "codes.n=8"]
    run, _ = check(load_run(overrides=[*overrides(data, tmp_path, "features", 1), *features]))
    assert run.label == "simla-tiny-features8"
    prepared = prepare(run, tmp_path / "prepared", 1)
    tokenizer = load_tokenizer(run, prepared.folder)
    codes = tokenizer(torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8))
    assert codes.shape == (2, 36)
    assert tokenizer.centroids.shape == (8, 32)


def test_too_many_unusable_rows_stop_the_run_with_one_line(ray_session, data, tmp_path):
    run = load_run(overrides=[*overrides(data, tmp_path, "strict", 1), "data.max_drop_fraction=0.01"])
    with pytest.raises(UserError, match=r"data.max_drop_fraction: \d of 97 training rows cannot be used"):
        pretrain(run, lambda _: None)


def test_the_same_name_twice_at_once_is_refused(ray_session, data, tmp_path):
    import fcntl

    folder = tmp_path / "busy"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is running this run"):
            pretrain(load_run(overrides=overrides(data, tmp_path, "busy", 1)), lambda _: None)

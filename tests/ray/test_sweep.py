"""Whole sweeps through Ray Tune: trials that end in every way, a study of two sweeps, a trunk, a Pareto front."""

import os
import signal
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from simla_ray.config.load import difference, load_run
from simla_ray.config.sweep import load_sweep
from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.orchestration.sweep import sweep
from simla_ray.orchestration.trials import LOST_DRIVERS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 12
#: Ranges that hold rates with which the model learns, stands still and overflows.
LR, VOCAB = "optim.lr", "objectives.psl.vocab"


def base(world_files: Path, storage: Path, name: str, *more: str) -> list[str]:
    return [
        f"name={name}", f"storage={storage}", f"data.train=[{world_files}/train.parquet]",
        f"data.val=[{world_files}/val.parquet]", f"data.test=[{world_files}/test.parquet]",
        "batch.micro=8", "batch.global=16", "ray.workers=1", "ray.cpus_per_worker=0.5", "data.decode_cpus=1",
        "vision.width=32", "text.width=32", "text.ffn=64", "joint_width=16", "codes.n=16", "codes.fit_images=40",
        f"optim.max_steps={STEPS}", "optim.warmup_steps=1", "optim.min_lr=1e-12", "checkpoint.every_steps=4", "eval.every_steps=4",
        "eval.batches=2", "eval.pairs=24", "eval.rerank_top_k=4", "log.every_steps=2", "ray.device=cpu",
        "schedule.kind=joint", "schedule.phases=[]", "sweep.metrics=[mlm_accuracy]", "sweep.grace=0.3",
        "checkpoint.rollback_after=2", "ray.max_failures=1", *more,
    ]  # fmt: skip


def plan_of(tmp_path: Path, space: str, overrides: list[str]):
    file = tmp_path / "sweep.yaml"
    file.write_text(f"size: tiny\nsweep:\n  space:\n{space}")
    return load_sweep([file], overrides)


def holder_of(lock: Path) -> int | None:
    """The process that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == lock:
                return int(link.parts[2])
        except OSError:  # it has just ended, or is another user's
            continue
    return None


def kill_drivers(folder: Path, times: int, killed: list[int]) -> None:
    """SIGKILL the driver of a trial as soon as it is there, again and again."""
    while len(killed) < times:
        pid = holder_of(folder / ".lock")
        if pid is not None and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.05)


def enqueued(path: Path, name: str, *trials: tuple[float, Path | None]) -> str:
    """A storage with a study in which trials wait to be run."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    for lr, vocab in trials:
        study.enqueue_trial({LR: lr, VOCAB: vocab and str(vocab)})
    return f"sweep.storage={path}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with files that a trial cannot use, and the space that has them."""
    folder = tmp_path_factory.mktemp("sweep")
    strangers, pipe = folder / "strangers.txt", folder / "pipe.txt"
    strangers.write_text("zzzyx\n")
    os.mkfifo(pipe)  # whoever opens it to read waits for a writer that never comes
    space = (
        "    optim.lr: {log: [1.0e-12, 1.0e+30]}\n"
        f"    objectives.psl.vocab: {{choice: [null, {strangers}, {pipe}]}}\n"
    )
    return folder, space, strangers, pipe


@pytest.fixture(scope="module")
def swept(ray_session, world_files, place):
    """A sweep whose trials end in every way but one."""
    folder, space, strangers, _ = place
    trials = ((4e-3, None), (1e-12, None), (4e-3, strangers), (1e30, None), (3e-3, None))
    kept = enqueued(folder / "study.journal", "shared", *trials)
    more = [kept, "sweep.study=shared", "sweep.trials=5", "sweep.seeds=1", "sweep.concurrent=2"]
    plan = plan_of(folder, space, base(world_files, folder, "all", *more))
    killed: list[int] = []
    killer = threading.Thread(
        target=kill_drivers, args=(folder / "all/trials/trial-004", LOST_DRIVERS + 1, killed), daemon=True
    )
    killer.start()
    said: list[str] = []
    summary = sweep(plan, said.append)
    killer.join(5)
    assert len(killed) == LOST_DRIVERS + 1
    return folder / "all", plan, summary, said


def test_every_end_of_a_trial_is_named(swept):
    folder, plan, summary, said = swept
    print("\n".join(said))
    for t in summary["trials"]:
        print(t)
    found = {t["name"]: t for t in summary["trials"]}
    assert list(found) == [f"trial-{i:03d}" for i in range(5)]
    assert [t["status"] for t in found.values()] == ["finished", "stopped", "failed", "failed", "failed"]

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

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 12
#: Ranges that hold rates with which the model learns, stands still and overflows.
LR, VOCAB = "optim.lr", "objectives.psl.vocab"


def base(world_files: Path, storage: Path, name: str, *more: str) -> list[str]:
    return [
        f"name={name}", f"storage={storage}", f"data.train=[{world_files}/train.parquet]",
        f"data.val=[{world_files}/val.parquet]", f"data.test=[{world_files}/test.parquet]",
        "batch.micro=8", "batch.global=16", "ray.workers=1", "ray.cpus_per_worker=0.5", "data.decode_cpus=1",
        "vision.width=32", "text.width=32", "text.ffn=64", "joint_width=16", "codes.n=16", "codes.fit_images=40",
        f"optim.max_steps={STEPS}", "optim.warmup_steps=1", "optim.min_lr=1e-12",
        "checkpoint.every_steps=4", "eval.every_steps=4",
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
    # Two at a time: the last one reports long after the first, so it is it that is stopped.
    trials = ((4e-3, None), (4e-3, strangers), (1e30, None), (3e-3, None), (1e-12, None))
    kept = enqueued(folder / "study.journal", "shared", *trials)
    more = [kept, "sweep.study=shared", "sweep.trials=5", "sweep.seeds=1", "sweep.concurrent=2"]
    plan = plan_of(folder, space, base(world_files, folder, "all", *more))
    killed: list[int] = []
    killer = threading.Thread(
        target=kill_drivers, args=(folder / "all/trials/trial-003", LOST_DRIVERS + 1, killed), daemon=True
    )
    killer.start()
    said: list[str] = []
    summary = sweep(plan, said.append)
    killer.join(5)
    assert len(killed) == LOST_DRIVERS + 1
    return folder / "all", plan, summary, said


def test_every_end_of_a_trial_is_named(swept):
    folder, _, summary, said = swept
    found = {t["name"]: t for t in summary["trials"]}
    assert list(found) == [f"trial-{i:03d}" for i in range(5)]
    ended = [t["status"] for t in found.values()]
    assert ended == ["finished", "failed", "failed", "failed", "stopped"], "\n".join(said)
    assert [t["stopped_early"] for t in found.values()] == [False, False, False, False, True]
    assert found["trial-004"]["steps"] in summary["rungs"] and found["trial-004"]["value"] is not None
    assert "objectives.psl.vocab" in found["trial-001"]["reason"]
    assert "not finite at step 4: " in found["trial-002"]["reason"]
    assert found["trial-003"]["reason"] == "the process of its driver was lost"
    for trial in found.values():
        assert (trial["reason"] is None) is (trial["status"] in ("finished", "stopped")), trial
        assert sum(line.startswith(f"end        {trial['name']}  ") for line in said) == 1, said
    assert (summary["best"], summary["unfinished"]) == ("trial-000", False)
    for name in ("sweep.yaml", "summary.json", "best.yaml", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / ".tune").exists()


def test_best_yaml_is_the_best_trial(swept):
    folder, plan, summary, _ = swept
    best = load_run([folder / "best.yaml"])
    trial = load_run([folder / "trials" / summary["best"] / "config.yaml"], presets=False)
    own = {path for path, _, _ in difference(trial, best, "identity")}
    assert own <= {"data.test", "data.test_split"}, own  # trials are evaluated on the validation set
    assert best.data.test == plan.base.data.test


def test_the_base_is_repeated_on_the_test_set(swept):
    folder, _, summary, _ = swept
    repeats = summary["repeats"]
    assert repeats["seeds"] == [1] and [run["name"] for run in repeats["default"]] == ["default-seed1"]
    run = load_run([folder / "repeats" / "default-seed1" / "config.yaml"], presets=False)
    assert run.seed == 1 and [Path(uri).name for uri in run.data.test] == ["test.parquet"]


def test_another_sweep_feeds_the_same_study_and_gives_up_what_takes_too_long(swept, place, world_files):
    folder, space, _, pipe = place
    kept = enqueued(folder / "study.journal", "shared", (4e-3, pipe))
    more = [kept, "sweep.study=shared", "sweep.trials=1", "sweep.seeds=0", "sweep.timeout_s=3"]
    said: list[str] = []
    summary = sweep(plan_of(folder, space, base(world_files, folder, "late", *more)), said.append)
    assert [t["status"] for t in summary["trials"]] == ["elsewhere"] * 5 + ["timed_out"]
    assert summary["trials"][5]["reason"] == "not done after 3 s"
    assert summary["best"] == "trial-000"  # the study's, whoever ran it
    assert (folder / "late" / "report.html").exists() and (folder / "late" / "best.yaml").exists()


def test_what_never_fits_is_refused_before_the_first_trial(ray_session, place, world_files):
    folder, space, *_ = place
    large = ["ray.workers=2", "data.decode_cpus=2", "ray.cpus_per_worker=2.5"]
    with pytest.raises(UserError, match=r"sweep\.concurrent: 1 at a time, but one takes 7\.1 CPUs"):
        sweep(plan_of(folder, space, base(world_files, folder, "large", *large)), lambda line: None)
    assert not (folder / "large" / "trials").exists()


@pytest.fixture(scope="module")
def forked(ray_session, world_files, tmp_path_factory):
    """A front of two trials of two workers that only fit one at a time, from one trunk."""
    folder = tmp_path_factory.mktemp("front")
    space = "    objectives.psl.weight: {log: [2, 100]}\n"
    more = [
        "sweep.metrics=[retrieval/itc/t2i_r10, keywords/ap]", "sweep.trials=2", "sweep.seeds=0", "sweep.trunk_steps=4",
        "ray.workers=2", "data.decode_cpus=2", "ray.cpus_per_worker=1.5",
    ]  # fmt: skip
    overrides = [o for o in base(world_files, folder, "front") if not o.startswith("sweep.")]
    said: list[str] = []
    return folder / "front", sweep(plan_of(folder, space, [*overrides, *more]), said.append), said


def test_trials_that_fit_one_at_a_time_all_run(forked):
    _, summary, said = forked
    assert summary["concurrent"] == 1
    assert [t["status"] for t in summary["trials"]] == ["finished"] * 2, "\n".join(said)
    kinds = [line.split()[0] for line in said if line.startswith(("start ", "end "))]
    assert kinds == ["start", "end"] * 2


def test_a_front_has_both_metrics_of_every_trial(forked):
    _, summary, _ = forked
    assert summary["rungs"] == [] and not any(t["stopped_early"] for t in summary["trials"])
    for trial in summary["trials"]:
        assert trial["value"] is None and len(trial["values"]) == 2
        assert trial["values"] == [trial["metrics"][o["metric"]] for o in summary["objectives"]]
        assert trial["steps"] == STEPS
    assert summary["front"] and set(summary["front"]) <= {t["name"] for t in summary["trials"]}
    assert summary["best"] in summary["front"]


def test_trials_go_on_from_one_trunk(forked):
    folder, summary, said = forked
    assert sum(line.startswith("trunk ") for line in said) == 1
    first = read_lines(folder / "trunk" / "metrics.jsonl")
    assert {line["step"] for line in first if line["kind"] == "train"} == {1, 2, 3, 4}
    assert not (folder / "trunk" / "summary.json").exists()
    for trial in summary["trials"]:
        own = folder / "trials" / trial["name"]
        begun = [e for e in read_lines(own / "events.jsonl") if e["event"] in ("start", "resume")]
        assert [(e["event"], e["step"]) for e in begun] == [("start", 4)]
        lines = read_lines(own / "metrics.jsonl")
        assert lines[: len(first)] == first
        assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))

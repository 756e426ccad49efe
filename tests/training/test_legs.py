"""Where a leg begins: what the earlier ones left, whether going on makes sense, and who may write."""

import json
import multiprocessing
import time

import pytest

from simla_ray.data.cursor import Cursor
from simla_ray.errors import UserError
from simla_ray.training.events import log_event
from simla_ray.training.legs import begin, fence, tidy
from simla_ray.training.state import State


def checkpoint(folder, step, score=None, manifest="{}"):
    """A folder that looks complete: its manifest lists no files."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = State(step, Cursor.start(1), seconds=float(step), score=score)
    (path / "state.json").write_text(json.dumps(state.to_json()))
    (path / "manifest.json").write_text(manifest)
    return path


def metrics(folder, *steps):
    lines = [{"step": step, "kind": "train", "seconds": float(step)} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_leg_starts(tmp_path):
    leg = begin(tmp_path, 2, {}, first=True)
    assert leg.checkpoint is None
    assert leg.complete == leg.past == ()
    assert leg.events == (("start", {"step": 0, "world_size": 2}),)


def test_a_later_leg_knows_what_was_lost_and_why(tmp_path):
    for step in (10, 20):
        checkpoint(tmp_path, step, score=step / 100)
    metrics(tmp_path, 10, 20, 27)
    log_event(tmp_path, "start", step=0, world_size=2)
    log_event(tmp_path, "failure", reason="worker 1: died", workers={"1": "died"})
    leg = begin(tmp_path, 1, {"batch.micro": [32, 16]}, first=False)
    assert leg.checkpoint == "step-00000020"
    assert leg.complete == (("step-00000010", 10, 0.1), ("step-00000020", 20, 0.2))
    ((kind, event),) = leg.events
    assert kind == "resume"
    assert event["down_s"] < 60
    del event["down_s"]
    assert event == {
        "step": 20, "world_size": 1, "before": 2, "reason": "worker 1: died", "changed": {},
        "lost_steps": 7, "lost_s": 7.0,
    }  # fmt: skip


@pytest.mark.parametrize(("first", "reason"), [(True, "the command ended"), (False, "the group takes another size")])
def test_without_a_failure_it_was_the_command_or_the_size(tmp_path, first, reason):
    log_event(tmp_path, "start", step=0, world_size=1)
    leg = begin(tmp_path, 2, {"batch.micro": [32, 16]}, first=first)
    assert leg.events[-1][1]["reason"] == reason
    assert leg.events[-1][1]["changed"] == ({"batch.micro": [32, 16]} if first else {})


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, manifest='{"model.safetensors": "00"}')
    log_event(tmp_path, "start", step=0, world_size=1)
    leg = begin(tmp_path, 1, {}, first=False)
    assert leg.checkpoint == "step-00000010"
    assert leg.events[0] == ("checkpoint_damaged", {"name": "step-00000020", "next": "step-00000010"})


def test_tidying_sets_damaged_ones_aside_and_leaves_the_others(tmp_path):
    good, bad = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20, manifest="{")
    folder = tmp_path / "checkpoints"
    (folder / ".unfinished-step-00000030").mkdir()
    (folder / "checkpoint_manager_snapshot.json").touch()
    assert tidy(folder) == ["step-00000020"]
    assert good.exists() and not bad.exists()
    names = {p.name.rpartition("-")[0] if p.name.startswith("damaged") else p.name for p in folder.iterdir()}
    assert names == {"step-00000010", "damaged-step-00000020"}
    assert tidy(folder) == []


def test_steps_without_a_finite_gradient_are_passed_later(tmp_path):
    log_event(tmp_path, "start", step=0, world_size=1)
    log_event(tmp_path, "rollback", first=7, last=16)
    leg = begin(tmp_path, 1, {}, first=False)
    assert leg.past == ((7, 16),)
    assert leg.events[-1][1]["reason"] == "no finite gradient in steps 7 to 16"


def hold(folder, ready, seconds):
    with fence(folder):
        ready.set()
        time.sleep(seconds)


def test_the_fence_waits_for_an_earlier_worker(tmp_path):
    ready = multiprocessing.Event()
    other = multiprocessing.Process(target=hold, args=(tmp_path, ready, 1.0))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="an earlier start still writes"), fence(tmp_path, 0.3):
        pass
    with fence(tmp_path, 30):
        assert not other.is_alive() or other.join() is None
    other.join()


def test_the_fence_falls_with_the_process(tmp_path):
    ready = multiprocessing.Event()
    other = multiprocessing.Process(target=hold, args=(tmp_path, ready, 600))
    other.start()
    assert ready.wait(30)
    other.kill()
    with fence(tmp_path, 10):
        pass
    other.join()

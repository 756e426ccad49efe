"""What follows from a run's events, and who may know them."""

import subprocess
import sys

from simla_ray.jsonl import read_lines
from simla_ray.training.events import end_is_known, failures_in_a_row, log_event, note_stop, stopped


def test_failures_count_from_the_last_checkpoint_of_this_command(tmp_path):
    for _ in range(3):
        log_event(tmp_path, "failure", reason="before")
    since = len(read_lines(tmp_path / "events.jsonl"))
    log_event(tmp_path, "failure", reason="one")
    assert failures_in_a_row(tmp_path, since) == ["one"]
    log_event(tmp_path, "resume", step=0)
    log_event(tmp_path, "failure", reason="two")
    assert failures_in_a_row(tmp_path, since) == ["one", "two"]
    log_event(tmp_path, "checkpoint", step=5)
    assert failures_in_a_row(tmp_path, since) == []


def test_one_end_of_a_leg_is_enough(tmp_path):
    """Workers that leave on a notice fail in Ray's eyes."""
    assert not end_is_known(tmp_path)
    log_event(tmp_path, "start", step=0, world_size=2)
    assert not end_is_known(tmp_path)
    log_event(tmp_path, "notice", step=5, reason="nodes of workers [1] go")
    log_event(tmp_path, "checkpoint", step=5)
    assert end_is_known(tmp_path)
    log_event(tmp_path, "resume", step=5, world_size=1)
    assert not end_is_known(tmp_path)


def test_a_note_is_what_was_noted(tmp_path):
    assert stopped(tmp_path) is None
    note_stop(tmp_path, "data.train: no")
    assert stopped(tmp_path) == "data.train: no"


def test_rays_controller_loads_no_model_for_them():
    """It is started anew for every run, and again after its death."""
    code = "import sys, simla_ray.orchestration.failures; print('timm' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr

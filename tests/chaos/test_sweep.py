"""A sweep whose driver is killed half way, and the same command again: no trial twice, none lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simla_ray.jsonl import read_lines
from tests.chaos.machines import cluster
from tests.ray.test_sweep import base

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS = 40
SPACE = "size: tiny\nsweep:\n  space:\n    objectives.psl.weight: {log: [2, 100]}\n"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("cluster"), 4) as started:
        yield started.address


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder, when it was written and how large it is."""
    found = {p: p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {str(p.relative_to(folder)): (s.st_mtime_ns, s.st_size) for p, s in found.items()}


def trials(folder: Path) -> list[dict]:
    summary = folder / "summary.json"
    return json.loads(summary.read_text())["trials"] if summary.exists() else []


def test_the_same_command_goes_on_with_a_killed_sweep(address, world_files, tmp_path):
    file, out = tmp_path / "space.yaml", tmp_path / "out.txt"
    file.write_text(SPACE)
    more = [
        f"optim.max_steps={STEPS}", "sweep.metrics=[retrieval/itc/t2i_r10, keywords/ap]", "sweep.trials=4",
        "sweep.seeds=0", "sweep.concurrent=2",
    ]  # fmt: skip
    # Two metrics: every trial goes to its end, so a trial without a summary is an interrupted one.
    command = [sys.executable, str(ROOT / "experiments" / "sweep_psl.py"), "--config", str(file)]
    command += base(world_files, tmp_path, "killed", *more)
    folder = tmp_path / "killed"

    def begin() -> subprocess.Popen:
        return subprocess.Popen(
            command, env=os.environ | {"RAY_ADDRESS": address}, stdout=out.open("a"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def finished() -> list[Path]:
        return [folder / "trials" / t["name"] for t in trials(folder) if t["status"] == "finished"]

    def interrupted() -> list[Path]:
        begun = {p.parent.parent for p in (folder / "trials").glob("*/checkpoints/step-*")}
        return sorted(trial for trial in begun if not (trial / "summary.json").exists())

    driver, deadline = begin(), time.monotonic() + 400
    while not (finished() and interrupted()):
        assert driver.poll() is None and time.monotonic() < deadline, out.read_text()[-2000:]
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    done = {trial: written(trial) for trial in finished()}
    going_on = interrupted()
    again = begin()
    assert again.wait(400) == 0, out.read_text()[-2000:]
    assert {trial: written(trial) for trial in done} == done
    for trial in going_on:
        resumed = [e for e in read_lines(trial / "events.jsonl") if e["event"] == "resume"]
        assert [e["step"] > 0 for e in resumed] == [True], resumed
    assert [t["name"] for t in trials(folder)] == [f"trial-{i:03d}" for i in range(4)]
    assert {t["status"] for t in trials(folder)} == {"finished"}
    assert "resume     " in out.read_text()
    started = time.monotonic()
    assert begin().wait(120) == 0 and out.read_text().count("is finished") == 1
    assert time.monotonic() - started < 60

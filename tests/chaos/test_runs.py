"""Exactly once: real runs over Ray, killed with SIGKILL from outside, driver or worker, with other sizes in between."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simla_ray.jsonl import read_lines
from tests.chaos.test_group import EPOCHS, KILLS, Group, overrides, write_rows

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]


class Run(Group):
    """A run of ``experiments/pretrain.py`` in a Ray that outlives it."""

    def __init__(self, storage: Path, name: str, overrides: list[str], address: str):
        self.folder, self.legs = storage / name, 0
        self.overrides = [*overrides, f"name={name}", f"storage={storage}", "ray.device=cpu", "eval.pairs=64"]
        self.environment = os.environ | {"RAY_ADDRESS": address}

    def command(self, world: int, *overrides: str) -> list[str]:
        sizes = (f"ray.workers={world}", f"data.decode_cpus={world}")
        return [sys.executable, str(ROOT / "experiments" / "pretrain.py"), *self.overrides, *sizes, *overrides]

    def until_killed(self, world: int, steps: int, *overrides: str) -> None:
        """Kill the driver with all its group, or one of the workers, after so many more steps."""
        goal = self.steps() + steps
        driver = subprocess.Popen(
            self.command(world, *overrides), env=self.environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while self.steps() < goal and driver.poll() is None:
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.02)
        assert driver.poll() is None, "the run ended before it could be killed"
        workers = workers_of_ray()
        if self.legs % 2 and workers:
            os.kill(random.choice(workers), signal.SIGKILL)
            assert driver.wait(120) != 0
        else:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        self.legs += 1
        gone = time.monotonic() + 60
        while workers_of_ray() and time.monotonic() < gone:  # the cluster ends what is left of the leg
            time.sleep(0.1)

    def to_the_end(self, world: int, *overrides: str) -> None:
        done = subprocess.run(self.command(world, *overrides), env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (self.folder / "summary.json").exists()


def workers_of_ray() -> list[int]:
    """Processes of train workers on this machine that belong to this user."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::RayTrainWorker") and path.stat().st_uid == os.getuid():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return folder, {
        "a": write_rows(folder / "a.parquet", "a", 5000, 40),
        "b": write_rows(folder / "b.parquet", "b", 600, 50),
    }


def test_exactly_once_with_ten_kills_and_one_two_one_workers(ray_session, data, tmp_path):
    folder, uids = data
    address = ray_session.get_runtime_context().gcs_address
    killed = Run(tmp_path, "killed", overrides(folder / "a.parquet"), address)
    draw = random.Random(7)
    for i in range(KILLS):
        killed.until_killed((1, 2, 1, 2, 2, 1, 1, 2, 2, 1)[i], draw.randint(2, 22))
    killed.to_the_end(1)
    times, drops = killed.times(), killed.drops()
    for epoch in range(EPOCHS):
        assert set(times[epoch]) == uids["a"]
        assert set(times[epoch].values()) == {1}
        assert set(drops[epoch].values()) == {1}
        assert len(drops[epoch]) == 125
    assert sum(e["event"] in ("start", "resume") for e in read_lines(killed.folder / "events.jsonl")) == KILLS + 1
    calm = Run(tmp_path, "calm", overrides(folder / "a.parquet"), address)
    calm.to_the_end(1)
    for step, (ours, theirs) in enumerate(zip(killed.losses(), calm.losses(), strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5 if step < 50 else 1e-2), step


def test_exactly_once_in_a_mixture_while_the_batch_size_changes(ray_session, data, tmp_path):
    folder, uids = data
    mixed = [*overrides(folder / "a.parquet", folder / "b.parquet"), "data.weights=[0.5, 1.5]"]
    killed = Run(tmp_path, "mixed", mixed, ray_session.get_runtime_context().gcs_address)
    draw = random.Random(8)
    for batch, world in ((64, 1), (128, 2), (96, 1), (64, 2), (32, 1)):
        killed.until_killed(world, draw.randint(3, 22), f"batch.global={batch}")
    killed.to_the_end(2, "batch.global=64", "batch.micro=16")
    times, drops = killed.times(), killed.drops()
    for epoch in range(EPOCHS):
        planned = times[epoch] + drops[epoch]
        a, b = ([n for uid, n in planned.items() if uid.startswith(name)] for name in ("a-", "b-"))
        assert sum(a) == len(a) == 2500
        assert sum(b) == 900 and len(b) == 600 and set(b) == {1, 2}
        assert not set(times[epoch]) - uids["a"] - uids["b"]

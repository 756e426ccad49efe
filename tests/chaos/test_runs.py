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
from tests.chaos.machines import cluster
from tests.chaos.test_group import EPOCHS, Group, overrides, write_rows

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]


class Run(Group):
    """A run of ``experiments/pretrain.py`` in a Ray that outlives it."""

    def __init__(self, storage: Path, name: str, overrides: list[str], address: str):
        self.folder, self.kills = storage / name, 0
        self.overrides = [*overrides, f"name={name}", f"storage={storage}", "ray.device=cpu", "eval.pairs=64"]
        self.environment = os.environ | {"RAY_ADDRESS": address}

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, str(ROOT / "experiments" / "pretrain.py"), *self.overrides, *overrides]

    def begin(self, world: int, *overrides: str) -> subprocess.Popen:
        """The driver of a leg, with processes of its own group."""
        sizes = (f"ray.workers={world}", f"data.decode_cpus={world}")
        self.output = self.folder.with_suffix(".out").open("a")
        return subprocess.Popen(
            self.command(*sizes, *overrides), env=self.environment, stdout=self.output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def reach(self, driver: subprocess.Popen, goal: int, limit_s: float = 300) -> None:
        """Wait until that step is logged."""
        self.until(driver, lambda: self.steps() >= goal, limit_s)

    def until(self, driver: subprocess.Popen, condition, limit_s: float = 300) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            said = self.folder.with_suffix(".out")
            assert driver.poll() is None, f"the run has ended: {said.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"no progress: {said.read_text()[-2000:]}"
            time.sleep(0.02)

    def kill_worker(self, driver: subprocess.Popen, sign: int = signal.SIGKILL) -> int:
        """One of the workers; Ray starts the group again."""
        legs = self.legs()
        pid = random.choice(workers_of_ray())
        os.kill(pid, sign)
        self.kills += 1
        self.until(driver, lambda: self.legs() > legs)
        return pid

    def until_killed(self, world: int, steps: int, *overrides: str, workers: int = 0) -> None:
        """Kill so many workers, one after the other, and at last the driver with all its group."""
        driver = self.begin(world, *overrides)
        for _ in range(workers):
            self.reach(driver, self.steps() + steps)
            self.kill_worker(driver)
        self.reach(driver, self.steps() + steps)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        self.kills += 1

    def finish(self, driver: subprocess.Popen, limit_s: float = 600) -> None:
        code = driver.wait(limit_s)
        assert code == 0, self.folder.with_suffix(".out").read_text()[-2000:]
        assert (self.folder / "summary.json").exists()

    def to_the_end(self, world: int, *overrides: str) -> None:
        self.finish(self.begin(world, *overrides))

    def events(self, *kinds: str) -> list[dict]:
        return [e for e in read_lines(self.folder / "events.jsonl") if e["event"] in kinds]

    def legs(self) -> int:
        return len(self.events("start", "resume"))


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


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("cluster"), 6) as started:
        yield started.address


def test_exactly_once_in_a_mixture_with_ten_kills_one_two_one_workers_and_another_batch(address, data, tmp_path):
    folder, uids = data
    mixed = [*overrides(folder / "a.parquet", folder / "b.parquet"), "data.weights=[0.8, 1.5]"]
    killed = Run(tmp_path, "killed", mixed, address)
    draw = random.Random(7)
    for world, workers in ((1, 2), (2, 3), (1, 2)):  # a driver takes longer to start than its workers
        killed.until_killed(world, draw.randint(2, 22), workers=workers)
    killed.to_the_end(2, "batch.global=128", "batch.micro=16")
    assert killed.kills == 10
    assert killed.legs() == killed.kills + 1
    times, drops = killed.times(), killed.drops()
    for epoch in range(EPOCHS):
        planned = times[epoch] + drops[epoch]
        a, b = ([n for uid, n in planned.items() if uid.startswith(name)] for name in ("a-", "b-"))
        assert sum(a) == len(a) == 4000
        assert sum(b) == 900 and len(b) == 600 and set(b) == {1, 2}
        assert not set(times[epoch]) - uids["a"] - uids["b"]
        assert not set(drops[epoch]) & (uids["a"] | uids["b"])
    # Without Ray it starts in a moment; that the losses are the same is tested in test_faults.py.
    until = killed.events("resume")[-1]["step"]
    assert until > 40
    calm = Group(tmp_path / "calm", mixed, killed.folder / "prepared")
    calm.until_killed(1, until)
    for step, (ours, theirs) in enumerate(zip(killed.losses()[:until], calm.losses(), strict=False)):
        assert ours == pytest.approx(theirs, rel=1e-5 if step < 50 else 1e-2), step

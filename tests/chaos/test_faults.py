"""Faults of one machine, from outside the run: it goes on by itself, or with the same command, and loses no sample."""

import os
import random
import shutil
import signal
import subprocess

import pytest

from simla_ray.jsonl import read_lines
from tests.chaos.machines import cluster, damage_newest, fill, small_disk, stall
from tests.chaos.test_group import Group, overrides, write_rows
from tests.chaos.test_runs import Run, workers_of_ray

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1800)]

EPOCHS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return folder / "a.parquet", write_rows(folder / "a.parquet", "a", 2000, 50)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Address of a cluster, and the file that names the steps to be poisoned."""
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, 6) as started:
        yield started.address, folder / "poison"


@pytest.fixture
def run(data, place, tmp_path):
    def make(name="run", storage=tmp_path):
        return Run(storage, name, [*overrides(data[0]), f"optim.epochs={EPOCHS}"], place[0])

    return make


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    """-> a function that gives the undisturbed run with the vocabulary of another.

    It is without Ray, so it starts in a moment; a run over Ray that equals it shows that Ray changes nothing.
    """
    made = []

    def undisturbed(hurt):
        if not made:
            settings = [*overrides(data[0]), f"optim.epochs={EPOCHS}"]
            made.append(Group(tmp_path_factory.mktemp("calm") / "calm", settings, hurt.folder / "prepared"))
            made[0].to_the_end(2)
        return made[0]

    return undisturbed


def every_sample_once(run, uids, *, lost=(), epochs=EPOCHS):
    """Each usable row once an epoch, the others named; ``lost`` rows of an epoch are named as well."""
    times, drops = run.times(), run.drops()
    for epoch in range(epochs):
        assert set((times[epoch] + drops[epoch]).values()) == {1}
        assert set(times[epoch]) == uids - {uid for e, uid in lost if e == epoch}
    return times


def test_exactly_once_when_workers_are_killed_and_one_hangs(run, data, calm):
    """Two workers, one after the other, in one command; then another stands still."""
    hurt = run()
    driver = hurt.begin(2, "ray.hang_timeout_s=30")  # shorter, and a busy machine seems to hang
    for goal, sign in ((15, signal.SIGKILL), (40, signal.SIGKILL), (55, signal.SIGSTOP)):
        hurt.reach(driver, goal)
        hurt.kill_worker(driver, sign)
    hurt.finish(driver)
    every_sample_once(hurt, data[1])
    assert hurt.losses() == calm(hurt).losses()
    assert hurt.times() == calm(hurt).times()
    resumed = hurt.events("resume")
    assert (len(resumed), len(hurt.events("failure"))) == (3, 2)  # the one that hangs is said as such
    for event in resumed:
        assert event["lost_steps"] <= 7 + 1  # one checkpoint interval, and the step of the fault
        assert event["reason"].startswith("worker ")
    (hung,) = hurt.events("hung")
    assert "hangs" in hung["reason"]
    assert hung["reason"] in hurt.folder.with_suffix(".out").read_text()


def test_exactly_once_when_the_disk_stalls_and_fills_and_the_newest_checkpoint_is_damaged(run, data, calm, tmp_path):
    """The first command waits for the disk, then has no room to the end; the second meets the damage."""
    with small_disk(tmp_path / "disk", tmp_path / "image") as disk:
        hurt = run(storage=disk)
        hurt.folder.mkdir()
        driver = hurt.begin(2)
        hurt.reach(driver, 20)
        stall(disk, 10)
        hurt.reach(driver, 30)
        ballast = fill(disk)
        assert driver.wait(300) == 2
        said = hurt.folder.with_suffix(".out").read_text()
        assert "warning    the checkpoint of step" in said
        assert "error: storage: the last checkpoint cannot be written" in said and "No space left" in said
        assert hurt.legs() == 1  # the stall was waited for
        ballast.unlink()
        newest = damage_newest(hurt.folder / "checkpoints")
        hurt.to_the_end(2)
        every_sample_once(hurt, data[1])
        assert hurt.losses() == calm(hurt).losses()
        assert f"checkpoint {newest.name} is set aside" in hurt.folder.with_suffix(".out").read_text()
        assert [e["name"] for e in hurt.events("checkpoint_damaged")] == [newest.name]
        assert hurt.events("resume")[0]["step"] < int(newest.name.rpartition("-")[2])
        assert hurt.legs() == 2


def test_exactly_once_when_gradients_are_not_finite(run, data, place, calm):
    """Two single steps are passed; of four in a row the run goes back to its checkpoint, and past them.

    Meanwhile a second command of the same name is refused in one line, and takes nothing.
    """
    place[1].write_text("12 20 31 32 33 34")
    hurt = run()
    driver = hurt.begin(2, "checkpoint.rollback_after=3")
    hurt.reach(driver, 5)
    second = subprocess.run(
        hurt.command("ray.workers=2", "data.decode_cpus=2"), env=hurt.environment, capture_output=True, text=True
    )
    hurt.finish(driver)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert "another process is running this run; give it another --name" in second.stderr
    place[1].unlink()
    (event,) = hurt.events("rollback")
    assert (event["first"], event["last"]) == (31, 33)
    lost = [d for d in read_lines(hurt.folder / "dropped.jsonl") if d["reason"] == "non_finite"]
    assert {d["step"] for d in lost} == {12, 20, 31, 32, 33, 34}
    assert len(lost) == 6 * 64
    every_sample_once(hurt, data[1], lost=[(d["epoch"], d["uid"]) for d in lost])
    assert hurt.losses()[:12] == calm(hurt).losses()[:12]


def test_a_run_that_gets_nowhere_gives_up(run, data, place):
    """A worker that dies again and again before the first checkpoint."""
    hurt = run()
    driver = hurt.begin(1, "ray.max_failures=1", "checkpoint.every_steps=1000")
    for leg in (1, 2):
        hurt.until(driver, lambda leg=leg: hurt.legs() == leg and hurt.steps() > 0)
        os.kill(random.choice(workers_of_ray()), signal.SIGKILL)
    assert driver.wait(300) == 2
    said = hurt.folder.with_suffix(".out").read_text()
    assert "error: ray.max_failures: 2 failures in a row without a new checkpoint" in said
    shutil.rmtree(hurt.folder)

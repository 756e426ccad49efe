"""A worker that stands still ends its process, and the one that the others wait for is named."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from simla_ray.training.watchdog import Beat, Watchdog, culprit


@pytest.mark.parametrize(
    ("beats", "rank"),
    [
        # One waits for data while the others are in the step after: it is behind.
        ([(0, 8, "in the step", 0, 100), (1, 8, "waiting for data", 0, 100), (2, 8, "in the step", 0, 100)], 1),
        # One has not even finished the step before.
        ([(0, 8, "waiting for data", 0, 100), (1, 7, "at the log point", 0, 100)], 1),
        # One does not write any more, whatever it did last.
        ([(0, 8, "in the step", 0, 100), (1, 9, "at the log point", 0, 40)], 1),
        # All are at the same place: the one that got there first has hung for longest.
        ([(0, 8, "in the step", 2, 100), (1, 8, "in the step", 1, 100)], 1),
        # One may take as long as it likes.
        ([(0, 3, "", 0, 100), (1, 8, "in the step", 1, 100)], 1),
    ],
)
def test_the_one_that_the_others_wait_for(beats, rank):
    assert culprit([Beat(*beat) for beat in beats], 100, 60).rank == rank


def work(folder, rank, hangs):
    def hung(beat):
        (Path(folder) / f"said-by-{rank}").write_text(json.dumps([beat.rank, beat.doing, beat.step]))

    with Watchdog(Path(folder) / "beats", rank, 2, 1.0, hung) as watchdog:
        watchdog("", 0)
        time.sleep(1.5)  # a validation takes as long as it likes
        for step in range(3):
            watchdog("waiting for data", step)
            time.sleep(0.1)
            watchdog("in the step", step)
            time.sleep(0.1)
        watchdog("waiting for data", 3)
        if not hangs:
            watchdog("in the step", 3)  # a collective that the other never enters
        time.sleep(60)


@pytest.mark.parametrize("stop", [False, True])
def test_both_end_and_the_silent_one_is_named(tmp_path, stop):
    """``stop``: the whole process stands still, and cannot end itself."""
    workers = [multiprocessing.Process(target=work, args=(tmp_path, rank, rank == 1)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    if stop:
        time.sleep(2.0)
        os.kill(workers[1].pid, signal.SIGSTOP)
    workers[0].join(30)
    assert workers[0].exitcode == -signal.SIGKILL
    if stop:
        os.kill(workers[1].pid, signal.SIGKILL)
    workers[1].join(30)
    assert workers[1].exitcode == -signal.SIGKILL
    (said,) = tmp_path.glob("said-by-*")
    assert json.loads(said.read_text())[0] == 1


def test_a_worker_that_moves_is_left_alone(tmp_path):
    with Watchdog(tmp_path, 0, 1, 1.0, lambda beat: pytest.fail("nothing hangs")) as watchdog:
        for step in range(15):
            watchdog("in the step", step)
            time.sleep(0.1)

"""Exactly once: a group of processes is killed again and again, with other sizes in between. Seconds, not minutes."""

import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simla_ray.config.load import load_run
from simla_ray.data.text import build_vocabulary
from simla_ray.jsonl import read_lines
from tests.chaos.leg import DONE, leg
from tests.chaos.machines import damage_newest

pytestmark = pytest.mark.slow

EPOCHS = 3
KILLS = 10


def write_rows(path: Path, name: str, n: int, bad: int) -> set[str]:
    """Small pictures, every ``bad``-th of them unusable; gives the uids of the others."""
    rng = np.random.default_rng(len(name))
    rows = []
    for i in range(n):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        usable = i % bad != 1
        rows.append(
            {"uid": f"{name}-{i:05d}", "image": buffer.getvalue() if usable else b"<html>", "captions": [f"a b{i % 7}"]}
        )
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    return {row["uid"] for i, row in enumerate(rows) if i % bad != 1}


class Group:
    """A run that is started, killed and started again until it is done."""

    def __init__(self, folder: Path, overrides: list[str], prepared: Path | None = None):
        """``prepared``: of a run whose losses this one is to have, down to the ids of the words."""
        self.folder, self.overrides, self.legs = folder, overrides, 0
        folder.mkdir()
        if prepared is not None:
            shutil.copytree(prepared, folder / "prepared")
        else:
            captions = [f"a b{i}" for i in range(7)]
            build_vocabulary(captions, load_run(overrides=overrides).text).save(folder / "prepared")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.chaos.leg"])

    def steps(self) -> int:
        return max((line["step"] for line in read_lines(self.folder / "metrics.jsonl")), default=0)

    def start(self, world: int, *overrides: str) -> list[multiprocessing.Process]:
        self.legs += 1
        group = [
            self.context.Process(target=leg, args=(self.folder, [*self.overrides, *overrides], rank, world, self.legs))
            for rank in range(world)
        ]
        for process in group:
            process.start()
        return group

    def until_killed(self, world: int, steps: int, *overrides: str) -> None:
        """SIGKILL one process of the group after so many more steps, then the others, as a cluster would."""
        group, goal = self.start(world, *overrides), self.steps() + steps
        deadline = time.monotonic() + 300
        while self.steps() < goal and all(p.is_alive() for p in group):
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.005)
        assert not (self.folder / DONE).exists(), "done before it could be killed"
        for process in random.sample(group, len(group)):
            os.kill(process.pid, signal.SIGKILL)
        for process in group:
            process.join()
            assert process.exitcode == -signal.SIGKILL

    def to_the_end(self, world: int, *overrides: str) -> None:
        for process in self.start(world, *overrides):
            process.join()
            assert process.exitcode == 0
        assert (self.folder / DONE).exists()

    def times(self) -> dict[int, Counter]:
        """Epoch -> uid -> how often it was trained on."""
        found: dict[int, Counter] = {}
        for line in read_lines(self.folder / "consumed.jsonl"):
            found.setdefault(line["epoch"], Counter())[line["uid"]] += 1
        return found

    def drops(self) -> dict[int, Counter]:
        found: dict[int, Counter] = {}
        for line in read_lines(self.folder / "dropped.jsonl"):
            found.setdefault(line["epoch"], Counter())[line["uid"]] += 1
        return found

    def losses(self) -> list[dict]:
        lines = [line for line in read_lines(self.folder / "metrics.jsonl") if line["kind"] == "train"]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["losses"] for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    uids = {"a": write_rows(folder / "a.parquet", "a", 5000, 40), "b": write_rows(folder / "b.parquet", "b", 600, 50)}
    return folder, uids


def overrides(*uris: Path, batch: int = 64) -> list[str]:
    return [
        f"data.train=[{', '.join(map(str, uris))}]", f"data.val=[{uris[0]}]", "data.audit=true",
        "data.shuffle_window=300", f"batch.global={batch}", "batch.micro=32", "optim.max_steps=null",
        f"optim.epochs={EPOCHS}",
        "optim.warmup_steps=5", "vision.image_px=16", "vision.patch_px=8", "vision.width=16", "vision.depth=1",
        "vision.heads=2", "vision.stem=patch", "text.width=16", "text.ffn=16", "text.heads=2", "joint_width=8",
        "queue=0", "objectives.itm=null", "objectives.mlm=null", "objectives.mim=null", "objectives.psl=null",
        "schedule.kind=joint", "schedule.phases=[]", "checkpoint.every_steps=7", "eval.every_steps=100000",
        "log.every_steps=1", "text.dropout=0.1",
    ]  # fmt: skip


def test_exactly_once_with_ten_kills_and_one_two_one_workers(data, tmp_path):
    """Every readable row once an epoch, the unusable ones named; the losses are those of a run that nobody killed."""
    folder, uids = data
    killed = Group(tmp_path / "killed", overrides(folder / "a.parquet"))
    draw = random.Random(5)
    for i in range(KILLS):
        killed.until_killed(1 + i // 3 % 2, draw.randint(2, 23))
    killed.to_the_end(1)
    times, drops = killed.times(), killed.drops()
    for epoch in range(EPOCHS):
        assert set(times[epoch]) == uids["a"]
        assert set(times[epoch].values()) == {1}
        assert len(drops[epoch]) == 125
        assert set(drops[epoch].values()) == {1}
    worlds = [e["world_size"] for e in read_lines(killed.folder / "events.jsonl") if e["event"] == "leg"]
    assert len(worlds) == KILLS + 1
    assert set(worlds) == {1, 2}

    calm = Group(tmp_path / "calm", overrides(folder / "a.parquet"))
    calm.to_the_end(1)
    for step, (ours, theirs) in enumerate(zip(killed.losses(), calm.losses(), strict=True)):
        # Sums over two workers round in another order than over one; training lets that grow.
        assert ours == pytest.approx(theirs, rel=1e-5 if step < 50 else 1e-2), step
    key = ("step", "lane", "epoch", "uid")
    consumed = [
        {tuple(line[k] for k in key) for line in read_lines(g.folder / "consumed.jsonl")} for g in (killed, calm)
    ]
    assert consumed[0] == consumed[1]


@pytest.mark.parametrize("world", [1, 2])
def test_exactly_once_and_the_very_losses_with_the_same_workers(data, tmp_path, world):
    """After the second kill the newest checkpoint is damaged as well."""
    folder, _ = data
    few = [*overrides(folder / "b.parquet", batch=96), "optim.max_steps=40"]  # two workers have two and one of three
    killed, calm = Group(tmp_path / "killed", few), Group(tmp_path / "calm", few)
    for steps in (9, 12):
        killed.until_killed(world, steps)
    newest = damage_newest(killed.folder / "checkpoints")
    killed.to_the_end(world)
    *_, last = (e for e in read_lines(killed.folder / "events.jsonl") if e["event"] == "leg")
    assert last["step"] < int(newest.name.rpartition("-")[2])
    calm.to_the_end(world)
    assert killed.losses() == calm.losses()
    assert killed.times() == calm.times()


def test_exactly_once_in_a_mixture_while_batch_size_and_workers_change(data, tmp_path):
    """One source one and a half times, another half; both with unusable rows, which are planned as the others are."""
    folder, uids = data
    mixed = [*overrides(folder / "a.parquet", folder / "b.parquet"), "data.weights=[1.5, 0.5]"]
    killed = Group(tmp_path / "killed", mixed)
    draw = random.Random(6)
    batches = [64, 32, 96, 64, 128, 32, 64, 96, 128, 64]
    for i, batch in enumerate(batches):
        killed.until_killed(2 if batch > 32 and i % 3 else 1, draw.randint(2, 20), f"batch.global={batch}")
    killed.to_the_end(2, "batch.global=64", "batch.micro=16")
    times, drops = killed.times(), killed.drops()
    for epoch in range(EPOCHS):
        planned = times[epoch] + drops[epoch]
        a = {uid: n for uid, n in planned.items() if uid.startswith("a-")}
        b = {uid: n for uid, n in planned.items() if uid.startswith("b-")}
        assert len(a) == 5000 and sum(a.values()) == 7500 and set(a.values()) == {1, 2}
        assert sum(b.values()) == 300 and set(b.values()) == {1}
        assert not set(times[epoch]) - uids["a"] - uids["b"]
        assert not set(drops[epoch]) & (uids["a"] | uids["b"])
    halves = [{uid for uid in times[epoch] if uid.startswith("b-")} for epoch in (0, 1)]
    assert halves[0] | halves[1] == uids["b"] and not halves[0] & halves[1]  # the other half has its turn

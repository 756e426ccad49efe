"""A checkpoint brings everything back, and says so when it cannot."""

import json
import time

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.cursor import Cursor
from simla_ray.data.order import Position
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_tensors
from simla_ray.models.model import Model
from simla_ray.models.visual_codes import PatchCodes
from simla_ray.training.checkpoint import (
    Snapshot,
    find_checkpoint,
    load_checkpoint,
    model_tensors,
    newest_and_damaged,
    verify,
)
from simla_ray.training.comm import Comm
from simla_ray.training.saver import Saver
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step

RUN = load_run(
    overrides=[
        "batch.micro=4", "batch.global=4", "ray.workers=1", "queue=8", "schedule.kind=joint", "schedule.phases=[]",
        "text.dropout=0.1", "codes.n=8", "optim.warmup_steps=2",
    ]
)  # fmt: skip
CPU = torch.device("cpu")


def make_step(vocabulary) -> Step:
    torch.manual_seed(0)
    model = Model(RUN, len(vocabulary))
    tokenizer = PatchCodes(torch.rand(8, 192, generator=torch.Generator().manual_seed(1)), 8)
    return Step(RUN, Losses(RUN, model, tokenizer, vocabulary.cls_id, None), 10, Comm(), CPU)


def save(folder, step: Step, state: State, prepared) -> None:
    snapshot = Snapshot(step.model, step.optimizer)
    snapshot.take(RUN, step.model, step.optimizer, state)
    snapshot.write(folder, prepared)


def run_steps(step: Step, batches, first: int, last: int) -> list[float]:
    return [float(step(i, [(0, batches[i])]).sums["total"]) for i in range(first, last)]


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def batches(world_rows, vocabulary):
    make = SampleMaker(RUN, vocabulary, training=True)
    return [collate(stacked([make(row, 0) for row in world_rows["train"][4 * i : 4 * i + 4]]), RUN) for i in range(6)]


def test_going_on_from_a_checkpoint_gives_the_same_losses(tmp_path, vocabulary, batches):
    vocabulary.save(tmp_path / "prepared")
    undisturbed = run_steps(make_step(vocabulary), batches, 0, 6)

    first = make_step(vocabulary)
    begun = run_steps(first, batches, 0, 3)
    state = State(3, Cursor((Position(0, 12),)), seconds=1.5, best_step=3, best_score=0.25)
    save(tmp_path / "ckpt", first, state, tmp_path / "prepared")

    second = make_step(vocabulary)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1.0)  # nothing of the fresh start may survive
    assert load_checkpoint(tmp_path / "ckpt", second.model, second.optimizer) == state
    assert begun + run_steps(second, batches, 3, 6) == undisturbed


def test_a_damaged_or_incomplete_checkpoint_is_refused(tmp_path, vocabulary):
    vocabulary.save(tmp_path / "prepared")
    step = make_step(vocabulary)
    folder = tmp_path / "ckpts" / "step-4"
    save(folder, step, State(4, Cursor.start(1)), tmp_path / "prepared")
    verify(folder)
    assert find_checkpoint(tmp_path / "ckpts") == find_checkpoint(tmp_path / "ckpts", 4) == folder
    assert find_checkpoint(tmp_path / "ckpts", 5) is None
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged"):
        verify(folder)
    older = folder.with_name("step-2")
    save(older, step, State(2, Cursor.start(1)), tmp_path / "prepared")
    assert newest_and_damaged(tmp_path / "ckpts") == (older, [folder])
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        verify(folder)
    (older / "state.json").write_text("{")
    assert find_checkpoint(tmp_path / "ckpts") is None


def test_only_safe_formats_are_written(tmp_path, vocabulary):
    vocabulary.save(tmp_path / "prepared")
    step = make_step(vocabulary)
    save(tmp_path / "c", step, State(0, Cursor.start(1)), tmp_path / "prepared")
    suffixes = {p.suffix for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}
    assert json.loads((tmp_path / "c" / "state.json").read_text())["step"] == 0


def test_a_copy_is_taken_before_the_next_step(tmp_path, vocabulary, batches):
    """What is written is the moment of the copy, however much later the thread gets to it."""
    vocabulary.save(tmp_path / "prepared")
    step = make_step(vocabulary)
    run_steps(step, batches, 0, 2)
    saver = Saver(tmp_path / "checkpoints", RUN, step.model, step.optimizer, tmp_path / "prepared")
    saver.thread.submit(time.sleep, 0.5)  # the disk is busy
    before = {n: t.clone() for n, t in model_tensors(step.model).items()}
    saver(State(2, Cursor.start(1), score=0.5))
    assert saver.finished() == []
    run_steps(step, batches, 2, 3)
    (saved,) = saver.finished(wait=True)
    assert (saved.folder, saved.step, saved.score, saved.error) == ("step-00000002", 2, 0.5, None)
    assert saved.blocked_s < 0.5 < saved.seconds
    stored = load_tensors(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(torch.equal(stored[n], t) for n, t in before.items())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    saver(State(2, Cursor.start(1)))  # the same step again, after a damaged one
    assert saver.finished(wait=True)[0].folder == "step-00000002-2"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, vocabulary):
    vocabulary.save(tmp_path / "prepared")
    step = make_step(vocabulary)
    (tmp_path / "checkpoints").touch()  # a file where the folder should be
    saver = Saver(tmp_path / "checkpoints", RUN, step.model, step.optimizer, tmp_path / "prepared")
    saver(State(2, Cursor.start(1)))
    (saved,) = saver.finished(wait=True)
    assert saved.error
    (tmp_path / "checkpoints").unlink()
    saver(State(2, Cursor.start(1)))
    assert saver.finished(wait=True)[0].error is None

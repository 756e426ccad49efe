"""A checkpoint brings everything back, and says so when it cannot."""

import json

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.cursor import Cursor
from simla_ray.data.order import Position
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.errors import UserError
from simla_ray.models.model import Model
from simla_ray.models.visual_codes import PatchCodes
from simla_ray.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint, verify
from simla_ray.training.comm import Comm
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
    (tmp_path / "ckpt").mkdir()
    save_checkpoint(tmp_path / "ckpt", RUN, first.model, first.optimizer, state, tmp_path / "prepared")

    second = make_step(vocabulary)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1.0)  # nothing of the fresh start may survive
    assert load_checkpoint(tmp_path / "ckpt", second.model, second.optimizer) == state
    assert begun + run_steps(second, batches, 3, 6) == undisturbed


def test_a_damaged_or_incomplete_checkpoint_is_refused(tmp_path, vocabulary):
    vocabulary.save(tmp_path / "prepared")
    step = make_step(vocabulary)
    folder = tmp_path / "ckpts" / "a"
    folder.mkdir(parents=True)
    save_checkpoint(folder, RUN, step.model, step.optimizer, State(4, Cursor.start(1)), tmp_path / "prepared")
    verify(folder)
    assert find_checkpoint(tmp_path / "ckpts") == find_checkpoint(tmp_path / "ckpts", 4) == folder
    assert find_checkpoint(tmp_path / "ckpts", 5) is None
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged"):
        verify(folder)
    older = folder.with_name("older")
    older.mkdir()
    save_checkpoint(older, RUN, step.model, step.optimizer, State(2, Cursor.start(1)), tmp_path / "prepared")
    assert find_checkpoint(tmp_path / "ckpts") == older
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        verify(folder)
    (older / "state.json").write_text("{")
    assert find_checkpoint(tmp_path / "ckpts") is None


def test_only_safe_formats_are_written(tmp_path, vocabulary):
    vocabulary.save(tmp_path / "prepared")
    step = make_step(vocabulary)
    (tmp_path / "c").mkdir()
    save_checkpoint(tmp_path / "c", RUN, step.model, step.optimizer, State(0, Cursor.start(1)), tmp_path / "prepared")
    suffixes = {p.suffix for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}
    assert json.loads((tmp_path / "c" / "state.json").read_text())["step"] == 0

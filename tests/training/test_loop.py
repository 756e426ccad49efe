"""The loop around the step: what it counts, when it validates and stores, and that it trains in training mode."""

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.cursor import Cursor
from simla_ray.data.order import Order, Position
from simla_ray.data.packing import Dropped, Packed
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.models.model import Model
from simla_ray.training.comm import Comm
from simla_ray.training.log import RunLog
from simla_ray.training.loop import Loop
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step

RUN = load_run(
    overrides=[
        "batch.micro=4", "batch.global=4", "ray.workers=1", "objectives.itm=null", "objectives.mlm=null",
        "objectives.mim=null", "schedule.kind=joint", "schedule.phases=[]", "log.every_steps=2", "eval.every_steps=3",
        "checkpoint.every_steps=4", "data.max_drop_fraction=0.1", "data.audit=true",
    ]
)  # fmt: skip


@pytest.fixture
def parts(vocabulary, world_rows, tmp_path):
    make = SampleMaker(RUN, vocabulary, training=True)
    rows = world_rows["train"][:4]
    batch = collate(stacked([make(row, 0) for row in rows]), RUN, [r["uid"] for r in rows], [0] * 4)
    losses = Losses(RUN, Model(RUN, len(vocabulary)), None, vocabulary.cls_id, None)
    step = Step(RUN, losses, 10, Comm(), torch.device("cpu"))
    losses.eval()  # as building an evaluator leaves it

    def stream(drops=()):
        for i in range(10):
            dropped = [Dropped(uid, "image_unreadable", 0) for uid in drops] if i == 1 else []
            yield Packed(batch, 0, Position(0, 4 * (i + 1)), dropped)

    calls = {"validated": [], "saved": [], "training": []}

    def validate():
        calls["training"].append(losses.training)
        calls["validated"].append(loop.state.step)
        return {"retrieval_r10": [0.1, 0.5, 0.95, 0.9, 0.99, 0.4][len(calls["validated"]) - 1]}

    def save(state, metrics):
        calls["saved"].append((state.step, metrics["retrieval_r10"]))

    log = RunLog(tmp_path, 0)
    loop = Loop(RUN, step, State(0, Cursor.start(1)), Order((40,), 1, 40, 0), Comm(), log, validate, save, {})
    return loop, stream, calls, tmp_path


def test_validates_stores_and_keeps_the_best_stored_step(parts):
    loop, stream, calls, folder = parts
    state = loop(stream())
    assert calls["validated"] == [3, 4, 6, 8, 9, 10]
    assert calls["saved"] == [(4, 0.5), (8, 0.9), (10, 0.4)]
    assert (state.best_step, state.best_score) == (8, 0.9)  # steps 6 and 9 were better, but are not stored
    events = [(e["event"], e["step"]) for e in read_lines(folder / "events.jsonl")]
    assert events == [("first_batch", 0), *(("checkpoint", step) for step in (4, 8, 10))]
    assert all(calls["training"])
    assert state.step == 10
    assert state.cursor == Cursor((Position(0, 40),))


def test_every_step_has_a_line_and_log_points_have_speed(parts):
    loop, stream, _, folder = parts
    loop.validate = lambda: {"retrieval_r10": 0.5}
    loop(stream())
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if "pairs_per_s" in line] == [2, 3, 4, 6, 8, 9, 10]
    assert set(lines[0]["losses"]) == {"itc", "psl", "total"}
    assert len(read_lines(folder / "consumed.jsonl")) == 40


def test_too_many_drops_stop_with_one_line(parts):
    loop, stream, _, folder = parts
    loop.validate = lambda: {"retrieval_r10": 0.5}
    with pytest.raises(UserError, match=r"max_drop_fraction: 5 of 40 training rows .*image_unreadable 5; first u0"):
        loop(stream([f"u{i}" for i in range(5)]))
    assert len(read_lines(folder / "dropped.jsonl")) == 5


def test_a_stream_that_ends_early_is_said(parts):
    loop, stream, _, _ = parts
    loop.validate = lambda: {"retrieval_r10": 0.5}
    short = stream()
    with pytest.raises(UserError, match="ran out of usable rows at step 2"):
        loop(next(short) for _ in range(2))

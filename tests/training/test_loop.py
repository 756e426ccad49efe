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
from simla_ray.training.loop import Leaving, Loop, RollBack
from simla_ray.training.saver import Saved, Saver
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step, StepOutput

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

    calls = {"validated": [], "saved": [], "registered": [], "training": []}

    def validate():
        calls["training"].append(losses.training)
        calls["validated"].append(loop.state.step)
        return {"retrieval_r10": [0.1, 0.5, 0.95, 0.9, 0.99, 0.4][len(calls["validated"]) - 1]}

    class Disk(Saver):
        """Writes nothing; ``broken`` steps fail."""

        broken = ()

        def __init__(self):
            self.made = []

        def __call__(self, state):
            calls["saved"].append((state.step, state.score))
            error = "No space left on device" if state.step in self.broken else None
            self.made.append(Saved(f"step-{state.step}", state.step, state.score, 0.0, 0.1, error))

        def finished(self, *, wait=False):
            found, self.made = self.made, []
            return found

    log = RunLog(tmp_path, 0)
    loop = Loop(
        RUN, step, State(0, Cursor.start(1)), Order((40,), 1, 40, 0), Comm(), log, validate, Disk(),
        lambda saved: calls["registered"].append(saved.step), {},
    )  # fmt: skip
    return loop, stream, calls, tmp_path


def test_validates_stores_and_keeps_the_best_stored_step(parts):
    loop, stream, calls, folder = parts
    state = loop(stream())
    assert calls["validated"] == [3, 4, 6, 8, 9, 10]
    assert calls["saved"] == [(4, 0.5), (8, 0.9), (10, 0.4)]
    assert (state.best_step, state.best_score) == (8, 0.9)  # steps 6 and 9 were better, but are not stored
    events = [(e["event"], e["step"]) for e in read_lines(folder / "events.jsonl")]
    assert calls["registered"] == [4, 8, 10]
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


def test_a_checkpoint_that_cannot_be_written_is_said_and_is_not_the_best(parts):
    loop, stream, calls, folder = parts
    loop.saver.broken = (8,)
    state = loop(stream())
    assert calls["registered"] == [4, 10]
    assert (state.best_step, state.best_score) == (4, 0.5)
    failed = [e for e in read_lines(folder / "events.jsonl") if e["event"] == "checkpoint_failed"]
    assert [(e["step"], e["reason"]) for e in failed] == [(8, "No space left on device")]


def test_the_last_checkpoint_must_be_written(parts):
    loop, stream, _, _ = parts
    loop.saver.broken = (10,)
    with pytest.raises(UserError, match=r"storage: the last checkpoint cannot be written \(No space left"):
        loop(stream())


def poisoned(loop, steps):
    """The gradients of these steps (from 1) are not finite."""
    step = loop.step

    class Poisoned:
        def __getattr__(self, name):
            return getattr(step, name)

        def __call__(self, number, batches):
            out = step(number, batches)
            return StepOutput(out.sums, out.grad_norm * (float("nan") if number + 1 in steps else 1.0))

    loop.step = Poisoned()


def test_samples_of_a_step_without_a_finite_gradient_are_named(parts):
    loop, stream, _, folder = parts
    poisoned(loop, {3, 7})
    loop(stream())
    dropped = read_lines(folder / "dropped.jsonl")
    assert [d["step"] for d in dropped] == [3] * 4 + [7] * 4
    assert {d["reason"] for d in dropped} == {"non_finite"}
    consumed = read_lines(folder / "consumed.jsonl")
    assert sorted({c["step"] for c in consumed}) == [1, 2, 4, 5, 6, 8, 9, 10]
    assert loop.dropped == {}  # nothing is wrong with these rows: they do not count for data.max_drop_fraction


def test_many_in_a_row_go_back_and_are_passed_the_next_time(parts):
    loop, stream, calls, folder = parts
    checkpoint = loop.run.checkpoint.model_copy(update={"rollback_after": 3})
    loop.run = loop.run.model_copy(update={"checkpoint": checkpoint})
    poisoned(loop, {2, 5, 6, 7, 8})
    with pytest.raises(RollBack):
        loop(stream())
    (event,) = [e for e in read_lines(folder / "events.jsonl") if e["event"] == "rollback"]
    assert (event["first"], event["last"]) == (5, 8)
    assert calls["saved"] == [(4, 0.5)]  # step 8 is not stored

    loop.validate = lambda: {"retrieval_r10": 0.5}
    loop.past, loop.non_finite = [(event["first"], event["last"])], []
    loop.state.step, loop.state.cursor, asked = 4, Cursor.start(1), []
    trained = loop.step
    loop.step = type("Asked", (), {
        "__getattr__": lambda _, name: getattr(trained, name),
        "__call__": lambda _, number, batches: asked.append(number + 1) or trained(number, batches),
    })()  # fmt: skip
    loop(stream())
    assert asked == [9, 10]


def test_a_notice_stores_this_very_step_and_ends_the_leg(parts):
    loop, stream, calls, folder = parts
    loop.noticed = lambda: {"ranks": [0], "left_s": 100.0} if loop.state.step >= 3 else None
    with pytest.raises(Leaving):
        loop(stream())
    assert calls["saved"][-1] == (loop.state.step, None)
    assert calls["registered"][-1] == loop.state.step
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"][
        -1
    ] == loop.state.step
    assert read_lines(folder / "events.jsonl")[-1]["event"] == "notice"

"""The training loop of a worker: batches in, steps, and at agreed steps log, validation and checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from simla_ray.config.schema import Run
from simla_ray.data.order import Order
from simla_ray.data.packing import Packed, check_drops
from simla_ray.errors import UserError
from simla_ray.models.compiling import eager
from simla_ray.training.comm import Comm
from simla_ray.training.log import RunLog
from simla_ray.training.optim import learning_rate
from simla_ray.training.saver import Saved, Saver
from simla_ray.training.state import State
from simla_ray.training.step import Step, StepOutput

#: Reason in dropped.jsonl of samples whose step had no finite gradient.
NON_FINITE = "non_finite"
#: Seconds between two looks for a notice, as far as steps allow.
LOOK_S = 5.0


class RollBack(Exception):
    """Too many steps in a row without a finite gradient: the worker goes back to its checkpoint and past them."""


class Leaving(Exception):
    """A node of the group will go; the checkpoint of this very step is stored."""


@dataclass
class _Pending:
    """What happened on this rank since the last log point; tensors still on the device."""

    outputs: list[StepOutput] = field(default_factory=list)
    packed: list[list[Packed]] = field(default_factory=list)
    wait_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)


class Loop:
    """Runs a worker to the last step.

    Args:
        order: of the training set; for epochs and the drop limit.
        log: on rank 0, else None.
        validate: collective; returns the metrics of a validation, the same on every rank, and leaves the model in
            training mode.
        saver: on rank 0, else None.
        register: collective; called for each checkpoint once it is complete.
        known_drops: uid -> reason of rows dropped by an earlier leg.
        past: (first, last) steps that are passed without training on them, because an earlier leg found no finite
            gradient there.
        noticed: collective; what is known of nodes of the group that will go soon, None where there are none.
        progress: called with what this worker does now, and with "" where it may take as long as it likes.
    """

    def __init__(
        self,
        run: Run,
        step: Step,
        state: State,
        order: Order,
        comm: Comm,
        log: RunLog | None,
        validate: Callable[[], dict[str, float]],
        saver: Saver | None,
        register: Callable[[Saved], None],
        known_drops: dict[str, str],
        past: Sequence[tuple[int, int]] = (),
        noticed: Callable[[], dict[str, Any] | None] = lambda: None,
        progress: Callable[[str, int], None] = lambda doing, step: None,
    ):
        self.run, self.step, self.state, self.comm, self.log = run, step, state, comm, log
        self.order = order
        state.total, state.micro = step.total, run.batch.micro
        self.validate, self.saver, self.register = validate, saver, register
        self.dropped = known_drops
        self.past, self.noticed, self.progress = past, noticed, progress
        self.pending = _Pending()
        self.look_at, self.step_s = state.step + 1, 0.0
        self.non_finite: list[int] = []  # steps in a row, up to the last log point
        self.best_before = (state.best_step, state.best_score)
        self.end = step.total

    def __call__(self, stream: Iterator[Packed], until: int | None = None) -> State:
        """Train to the last step, or ``until`` one before it, which is stored as the last one would be.

        Raises:
            UserError: the data ran out, too many rows cannot be used, or the last checkpoint cannot be written.
            RollBack: see there.
            Leaving: see there.
        """
        run, state = self.run, self.state
        self.end = self.step.total if until is None else until
        self.step.losses.train()
        first = state.step
        while state.step < self.end:
            self.progress("waiting for data", state.step)
            began = time.perf_counter()
            packed = [self._next(stream) for _ in range(self.comm.share(run.micro_batches))]
            waited = time.perf_counter() - began
            self.pending.wait_s += waited
            if state.step == first and self.log is not None:
                self.log.event("first_batch", step=first, seconds=round(waited, 3))
            self.progress("in the step", state.step)
            self.pending.outputs.append(self._trained(packed))
            self.pending.packed.append(packed)
            state.step += 1
            state.samples += run.batch.global_

            last = state.step == self.end
            evaluate, store = state.step % run.eval.every_steps == 0, state.step % run.checkpoint.every_steps == 0
            self.progress("at the log point", state.step)
            leaving = self._notice()
            if last or leaving is not None or evaluate or store or state.step % run.log.every_steps == 0:
                self._flush()
            self.progress("", state.step)
            if leaving is not None:
                self._leave(leaving)
            if last or evaluate or store:
                score = self._validate(may_be_best=last or store)
                if last or store:
                    self._save(score)
                    self._register(wait=last)
                state.seconds += time.perf_counter() - self.pending.since
                self.pending = _Pending()
        return state

    def _trained(self, packed: list[Packed]) -> StepOutput:
        if self._passed(self.state.step + 1):
            return StepOutput({}, torch.full((), math.nan, device=self.step.device))
        return self.step(self.state.step, [(p.lane, p.batch.to(self.step.device)) for p in packed])

    def _next(self, stream: Iterator[Packed]) -> Packed:
        try:
            return next(stream)
        except StopIteration:
            raise UserError(
                f"data.train: ran out of usable rows at step {self.state.step}; see dropped.jsonl"
            ) from None

    def _notice(self) -> dict[str, Any] | None:
        """Collective, at steps that all ranks agree on: will a node of the group go soon?"""
        if self.state.step < self.look_at or self.state.step == self.end:
            return None
        self.look_at = self.state.step + max(
            1, round(LOOK_S / self.step_s) if self.step_s else self.run.log.every_steps
        )
        return self.noticed()

    def _leave(self, notice: dict[str, Any]) -> None:
        """Collective: store this very step, and end the group so that Ray starts it on the nodes that stay."""
        self._save(None)
        self._register(wait=True)
        if self.log is not None:
            self.log.event("notice", step=self.state.step, reason=f"nodes of workers {notice['ranks']} go", **notice)
        raise Leaving

    def _flush(self) -> None:
        """Collective: bring the device's scalars and every rank's cursor, drops and audit together; rank 0 writes."""
        pending, state, run = self.pending, self.state, self.run
        first = state.step - len(pending.outputs) + 1
        names = sorted({name for output in pending.outputs for name in output.sums})
        zero = torch.zeros((), device=self.step.device)
        rows = [[o.sums.get(n, zero).float() for n in names] or [zero] for o in pending.outputs]
        table = self.comm.sum(torch.stack([torch.stack(row) for row in rows]).double()) / run.micro_batches
        norms = torch.stack([o.grad_norm for o in pending.outputs]).tolist()  # global already
        skipped = [not math.isfinite(n) for n in norms]
        lost = [(first + i, p) for i, step in enumerate(pending.packed) if skipped[i] for p in step]

        mine = {
            "moves": [(p.lane, p.position) for step in pending.packed for p in step],
            "drops": [
                (first + i, d.uid, d.reason, d.epoch)
                for i, step in enumerate(pending.packed) for p in step for d in p.dropped
            ],
            "non_finite": [
                (s, u, NON_FINITE, e) for s, p in lost for u, e in zip(p.batch.uid, p.batch.epoch, strict=True)
            ],
            "truncated": sum(p.truncated for step in pending.packed for p in step),
            "wait_s": pending.wait_s,
            "step_s": (time.perf_counter() - pending.since) / len(pending.outputs),
            "consumed": [
                (first + i, p.lane, e, u)
                for i, step in enumerate(pending.packed) if not skipped[i] for p in step
                for u, e in zip(p.batch.uid, p.batch.epoch, strict=True)
            ] if run.data.audit else [],
            "saved": self.saver.finished() if self.saver is not None else [],
        }  # fmt: skip
        every = self.comm.gather(mine)
        state.cursor = state.cursor.moved(move for part in every for move in part["moves"])
        self.dropped |= {uid: reason for part in every for _, uid, reason, _ in part["drops"]}
        self.step_s = max(part["step_s"] for part in every)

        now = time.perf_counter()
        elapsed, wait = now - pending.since, sum(part["wait_s"] for part in every) / self.comm.world
        state.seconds += elapsed
        state.wait_seconds += wait
        if self.log is not None:
            lines = self._lines(first, names, table.tolist(), norms, skipped)
            lines[-1] |= {
                "seconds": state.seconds,
                "epochs": state.cursor.epochs(self.order),
                "pairs_per_s": len(lines) * run.batch.global_ / elapsed,
                "data_wait_fraction": wait / elapsed,
                "dropped": len(self.dropped),
                "goodput": state.seconds / max(state.seconds, time.time() - self.log.began),
                "restarts": self.log.restarts,
                "truncated_fraction": sum(part["truncated"] for part in every) / (len(lines) * run.batch.global_),
            }
            self._write(self.log, lines, every)
        check_drops(self.dropped, self.order.rows, run)
        self._registered(every[0]["saved"])
        self.pending = _Pending()
        self._look_back(first, skipped)

    def _lines(
        self, first: int, names: list[str], table: list[list[float]], norms: list[float], skipped: list[bool]
    ) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl for the steps since the last log point."""
        lines = []
        for i, (row, output) in enumerate(zip(table, self.pending.outputs, strict=True)):
            present = {n: v for n, v in zip(names, row, strict=False) if n in output.sums}
            lines.append(
                {
                    "step": first + i,
                    "kind": "train",
                    "losses": {n: v for n, v in present.items() if "/" not in n},
                    "metrics": {n: v for n, v in present.items() if "/" in n},
                    "grad_norm": norms[i] if not skipped[i] else None,
                    "skipped": skipped[i],
                    "lr": learning_rate(first + i - 1, self.step.total, self.run.optim),
                }
            )
        return lines

    def _write(self, log: RunLog, lines: list[dict[str, Any]], every: list[dict[str, Any]]) -> None:
        drops = [d for part in every for d in (*part["drops"], *part["non_finite"])]
        log.write("metrics.jsonl", lines)
        log.write("dropped.jsonl", [{"step": s, "uid": u, "reason": r, "epoch": e} for s, u, r, e in drops])
        log.write(
            "consumed.jsonl",
            [
                {"step": s, "rank": rank, "lane": lane, "epoch": e, "uid": u}
                for rank, part in enumerate(every) for s, lane, e, u in part["consumed"]
            ],
        )  # fmt: skip
        scalars = {f"loss/{n}": v for n, v in lines[-1]["losses"].items()} | {
            f"train/{n}": lines[-1][n]
            for n in ("lr", "epochs", "pairs_per_s", "data_wait_fraction", "dropped", "goodput", "restarts")
        }
        log.scalars(self.state.step, scalars | lines[-1]["metrics"])

    def _look_back(self, first: int, skipped: list[bool]) -> None:
        """Steps without a finite gradient change nothing; many in a row say that something in the state is broken."""
        for step, bad in enumerate(skipped, first):
            if not self._passed(step):
                self.non_finite = [*self.non_finite, step] if bad else []
        if len(self.non_finite) >= self.run.checkpoint.rollback_after:
            if self.log is not None:
                self.log.event("rollback", first=self.non_finite[0], last=self.non_finite[-1])
            raise RollBack

    def _passed(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.past)

    def _save(self, score: float | None) -> None:
        self.state.score = score
        if self.saver is not None:
            self.saver(self.state)

    def _register(self, *, wait: bool) -> None:
        """Collective."""
        mine = self.saver.finished(wait=wait) if self.saver is not None else []
        self._registered(self.comm.gather(mine)[0])

    def _registered(self, every: list[Saved]) -> None:
        """Collective: what rank 0 has written is made known to Ray and to the log."""
        for saved in every:
            last = saved.step == self.end
            if saved.error is None:
                self.register(saved)
            elif self.state.best_step == saved.step:
                self.state.best_step, self.state.best_score = self.best_before
            if self.log is not None and saved.error is None:
                self.log.event(
                    "checkpoint", step=saved.step, seconds=round(saved.seconds, 3), blocked_s=round(saved.blocked_s, 4)
                )
                self.log.scalars(
                    self.state.step, {"train/checkpoint_step": saved.step, "train/checkpoint_s": saved.seconds}
                )
            elif self.log is not None:
                self.log.event("checkpoint_failed", step=saved.step, reason=saved.error)
            if saved.error is not None and last:
                raise UserError(
                    f"storage: the last checkpoint cannot be written ({saved.error}); make room, or mend it, and give "
                    "the same command again"
                )

    def _validate(self, *, may_be_best: bool) -> float:
        """-> the score; only a step that is stored as a checkpoint can be the best one."""
        with eager():
            metrics, state = self.validate(), self.state
        if state.best_metric != self.run.eval.best:  # another metric than in an earlier leg: scores do not compare
            state.best_metric, state.best_score = self.run.eval.best, None
        score = float(state.step) if self.run.eval.best == "last" else metrics[self.run.eval.best]
        # Of equal ones the later counts, as in Ray's retention, which would delete the earlier one.
        if may_be_best and (state.best_score is None or score >= state.best_score):
            self.best_before = (state.best_step, state.best_score)
            state.best_step, state.best_score = state.step, score
        if self.log is not None:
            self.log.write("metrics.jsonl", [{"step": state.step, "kind": "val", "metrics": metrics}])
            self.log.scalars(state.step, {f"val/{n}": v for n, v in metrics.items()})
        return score

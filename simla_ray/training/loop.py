"""The training loop of a worker: batches in, steps, and at agreed steps log, validation and checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from simla_ray.config.schema import Run
from simla_ray.data.order import Order
from simla_ray.data.packing import Packed, check_drops
from simla_ray.errors import UserError
from simla_ray.models.compiling import eager
from simla_ray.training.comm import Comm
from simla_ray.training.log import RunLog
from simla_ray.training.optim import learning_rate
from simla_ray.training.state import State
from simla_ray.training.step import Step, StepOutput


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
        save: collective; takes the state and its validation metrics, stores a checkpoint.
        known_drops: uid -> reason of rows dropped by an earlier leg.
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
        save: Callable[[State, dict[str, float]], None],
        known_drops: dict[str, str],
    ):
        self.run, self.step, self.state, self.comm, self.log = run, step, state, comm, log
        self.order = order
        state.total, state.micro = step.total, run.batch.micro
        self.validate, self.save = validate, save
        self.dropped = known_drops
        self.per_worker = run.micro_batches // comm.world
        self.pending = _Pending()

    def __call__(self, stream: Iterator[Packed]) -> State:
        run, state, total = self.run, self.state, self.step.total
        self.step.losses.train()
        first = state.step
        while state.step < total:
            began = time.perf_counter()
            packed = [self._next(stream) for _ in range(self.per_worker)]
            waited = time.perf_counter() - began
            self.pending.wait_s += waited
            if state.step == first and self.log is not None:
                self.log.event("first_batch", step=first, seconds=round(waited, 3))
            batches = [(p.lane, p.batch.to(self.step.device)) for p in packed]
            self.pending.outputs.append(self.step(state.step, batches))
            self.pending.packed.append(packed)
            state.step += 1
            state.samples += run.batch.global_

            last = state.step == total
            evaluate, store = state.step % run.eval.every_steps == 0, state.step % run.checkpoint.every_steps == 0
            if last or evaluate or store or state.step % run.log.every_steps == 0:
                self._flush()
            if last or evaluate or store:
                metrics = self._validate(may_be_best=last or store)
            if last or store:
                self.save(state, metrics)
                if self.log is not None:
                    self.log.event("checkpoint", step=state.step)
            if last or evaluate or store:
                state.seconds += time.perf_counter() - self.pending.since
                self.pending = _Pending()
        return state

    def _next(self, stream: Iterator[Packed]) -> Packed:
        try:
            return next(stream)
        except StopIteration:
            raise UserError(
                f"data.train: ran out of usable rows at step {self.state.step}; see dropped.jsonl"
            ) from None

    def _flush(self) -> None:
        """Collective: bring the device's scalars and every rank's cursor, drops and audit together; rank 0 writes."""
        pending, state, run = self.pending, self.state, self.run
        first = state.step - len(pending.outputs) + 1
        names = sorted({name for output in pending.outputs for name in output.sums})
        zero = torch.zeros((), device=self.step.device)
        table = torch.stack([torch.stack([o.sums.get(n, zero).float() for n in names]) for o in pending.outputs])
        table = (self.comm.sum(table.double()) / run.micro_batches).tolist()
        norms = torch.stack([o.grad_norm for o in pending.outputs]).tolist()  # global already
        skipped = [not math.isfinite(n) for n in norms]

        mine = {
            "moves": [(p.lane, p.position) for step in pending.packed for p in step],
            "drops": [
                (first + i, d.uid, d.reason, d.epoch)
                for i, step in enumerate(pending.packed) for p in step for d in p.dropped
            ],
            "truncated": sum(p.truncated for step in pending.packed for p in step),
            "wait_s": pending.wait_s,
            "consumed": [
                (first + i, p.lane, e, u)
                for i, step in enumerate(pending.packed) for p in step
                for u, e in zip(p.batch.uid, p.batch.epoch, strict=True)
            ] if run.data.audit else [],
        }  # fmt: skip
        every = self.comm.gather(mine)
        state.cursor = state.cursor.moved(move for part in every for move in part["moves"])
        drops = [d for part in every for d in part["drops"]]
        self.dropped |= {uid: reason for _, uid, reason, _ in drops}

        now = time.perf_counter()
        elapsed, wait = now - pending.since, sum(part["wait_s"] for part in every) / self.comm.world
        state.seconds += elapsed
        state.wait_seconds += wait
        if self.log is not None:
            steps = len(pending.outputs)
            rate = steps * run.batch.global_ / elapsed
            lines = []
            for i, row in enumerate(table):
                values = dict(zip(names, row, strict=True))
                present = {n: values[n] for n in names if n in pending.outputs[i].sums}
                lines.append(
                    {
                        "step": first + i,
                        "kind": "train",
                        "losses": {n: v for n, v in present.items() if "/" not in n},
                        "metrics": {n: v for n, v in present.items() if "/" in n},
                        "grad_norm": norms[i] if not skipped[i] else None,
                        "skipped": skipped[i],
                        "lr": learning_rate(first + i - 1, self.step.total, run.optim),
                    }
                )
            lines[-1] |= {
                "seconds": state.seconds,
                "epochs": state.cursor.epochs(self.order),
                "pairs_per_s": rate,
                "data_wait_fraction": wait / elapsed,
                "dropped": len(self.dropped),
                "truncated_fraction": sum(part["truncated"] for part in every) / (steps * run.batch.global_),
            }
            self.log.write("metrics.jsonl", lines)
            self.log.write("dropped.jsonl", [{"step": s, "uid": u, "reason": r, "epoch": e} for s, u, r, e in drops])
            self.log.write(
                "consumed.jsonl",
                [
                    {"step": s, "rank": rank, "lane": lane, "epoch": e, "uid": u}
                    for rank, part in enumerate(every) for s, lane, e, u in part["consumed"]
                ],
            )  # fmt: skip
            scalars = {f"loss/{n}": v for n, v in lines[-1]["losses"].items()} | {
                f"train/{n}": lines[-1][n] for n in ("lr", "epochs", "pairs_per_s", "data_wait_fraction", "dropped")
            }
            self.log.scalars(state.step, scalars | lines[-1]["metrics"])
        check_drops(self.dropped, self.order.rows, run)
        self.pending = _Pending()

    def _validate(self, *, may_be_best: bool) -> dict[str, float]:
        """Only a step that is stored as a checkpoint can be the best one."""
        with eager():
            metrics, state = self.validate(), self.state
        if state.best_metric != self.run.eval.best:  # another metric than in an earlier leg: scores do not compare
            state.best_metric, state.best_score = self.run.eval.best, None
        score = float(state.step) if self.run.eval.best == "last" else metrics[self.run.eval.best]
        # Of equal ones the later counts, as in Ray's retention, which would delete the earlier one.
        if may_be_best and (state.best_score is None or score >= state.best_score):
            state.best_step, state.best_score = state.step, score
        if self.log is not None:
            self.log.write("metrics.jsonl", [{"step": state.step, "kind": "val", "metrics": metrics}])
            self.log.scalars(state.step, {f"val/{n}": v for n, v in metrics.items()})
        return metrics

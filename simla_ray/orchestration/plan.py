"""The arithmetic of a run, for the banner and for ``--dry-run``."""

from __future__ import annotations

from pathlib import Path

import torch

from simla_ray.config.enums import ContrastScope
from simla_ray.config.schema import Run
from simla_ray.data.cursor import Cursor
from simla_ray.data.order import Order
from simla_ray.models.model import Model
from simla_ray.training.checkpoint import load_state


def total_steps(run: Run, order: Order, checkpoint: Path | None) -> int:
    """Steps of the run: ``optim.max_steps``, else what ``optim.epochs`` epochs take.

    The number stays what it was, with the schedule that hangs on it, unless the batch size has changed: then it is the
    steps done and those that the rest of the epochs takes.
    """
    if run.optim.max_steps is not None:
        return run.optim.max_steps
    if checkpoint is None:
        return order.steps(Cursor.start(order.lanes), run.optim.epochs, run.batch.micro)
    state = load_state(checkpoint)
    if (len(state.cursor.positions), state.micro) == (order.lanes, run.batch.micro):
        return state.total
    return state.step + order.steps(state.cursor.dealt_to(order), run.optim.epochs, run.batch.micro)


def plan(run: Run, order: Order, total: int, left_out: int = 0) -> list[str]:
    """The arithmetic of batches, steps, weights and validation.

    Args:
        left_out: rows that ``data.fraction`` leaves out.
    """
    rows = order.rows
    shares = [
        f"{order.planned(s)} of {uri} ({s.weight:g}x)" for s, uri in zip(order.shares, run.data.train, strict=False)
    ]
    each = f"{run.micro_batches // run.ray.workers}"
    if run.micro_batches % run.ray.workers:
        each += f" or {run.micro_batches // run.ray.workers + 1}"
    on = run.objectives.active()
    with torch.device("meta"):
        vocab = run.text.vocab_size
        model = Model(run.model_copy(update={"vision": run.vision.model_copy(update={"pretrained": False})}), vocab)
    trained = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("teacher."))
    pairs = total * run.batch.global_
    whole_step = run.objectives.itc is not None and run.objectives.itc.scope is ContrastScope.step
    negatives = (run.batch.global_ if whole_step else run.batch.micro) - 1 + run.queue
    kept = sum(order.unit_rows)
    return [
        *([f"rows       {kept} of {kept + left_out}, data.fraction={run.data.fraction:g}"] if left_out else []),
        *([f"mixture    {', '.join(shares)} samples an epoch"] if shares else []),
        f"batch      {run.batch.global_} pairs = {run.micro_batches} micro-batches of {run.batch.micro}, {each} on "
        f"each of {run.ray.workers} workers; {negatives} negatives per query",
        f"steps      {total} = {pairs} pairs = {pairs / rows:.1f} epochs of {rows} rows",
        f"objectives {' '.join(f'{name}*{o.weight:g}' for name, o in on.items())}; schedule {run.schedule.kind}",
        f"weights    {trained / 1e6:.2f} M trained{'' if run.teacher is None else ', as many in the teacher'}",
        f"every      {run.log.every_steps} steps a log point, {run.eval.every_steps} a validation, "
        f"{run.checkpoint.every_steps} a checkpoint (best by {run.eval.best})",
    ]

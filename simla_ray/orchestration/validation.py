"""Validation while training: fixed losses, and retrieval over the validation images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.collate import collate
from simla_ray.data.decode import DropRow
from simla_ray.data.questions import task_columns
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.errors import UserError
from simla_ray.evaluation import questions, statements
from simla_ray.evaluation.eval_set import EvalSet, Item, load_items
from simla_ray.evaluation.keywords import Unsaid, unsaid
from simla_ray.evaluation.retrieval import validation_retrieval
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.work import Work
from simla_ray.orchestration.prepare import Prepared
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses
from simla_ray.training.validation import fixed_losses
from simla_ray.types import EvalResult


class Validation:
    """Collective; call it for the metrics of the moment.

    Its rows are read once and split over the workers by number; those with questions are held by every worker, and all
    where ``keyword_ap`` picks the best checkpoint.

    Raises:
        UserError: no validation row can be used, or none says what ``keyword_ap`` is measured against.
    """

    def __init__(self, run: Run, prepared: Prepared, losses: Losses, comm: Comm, device: torch.device):
        self.run, self.losses, self.comm, self.device = run, losses, comm, device
        self.batches, self.n_batches = fixed_batches(run, prepared, comm)
        self.scorer = Scorer(run, losses.model, prepared.vocabulary, device)
        self.items: list[Item | str] = []
        self.asked: EvalSet | None = None
        if task_columns(run):
            asked = list(pipeline.iterate_rows(prepared.indexes["val"], comm.rank, comm.world, run.eval.pairs))
            self.asked = EvalSet.load(self.scorer, asked, Work(comm.rank, comm.world, comm.gather))
        self.unsaid: Unsaid | None = None
        by_keywords = run.eval.best == "keyword_ap"
        if "itc" in run.objectives.active() or by_keywords:
            rows = pipeline.iterate_rows(prepared.indexes["val"], comm.rank, comm.world, run.eval.pairs)
            self.items = load_items(self.scorer, rows)
        if by_keywords:
            self.unsaid = _unsaid(EvalSet.of(self.scorer, self.items, Work(comm.rank, comm.world, comm.gather)))

    def __call__(self) -> dict[str, float]:
        metrics = fixed_losses(self.run, self.losses, self.batches, self.n_batches, self.comm, self.device)
        if "itc" in self.run.objectives.active():
            metrics |= validation_retrieval(self.scorer, self.items, self.comm.gather)
        if self.unsaid is not None:
            self.scorer.eval_mode()
            metrics["keyword_ap"] = self.unsaid.ap()
        if self.asked is not None:
            self.scorer.eval_mode()
            for name, measure in (("answers", questions.measure), ("labels", statements.measure)):
                result = measure(self.asked)
                if isinstance(result, EvalResult):  # over all questions, and by ranking, in place of the fixed batches'
                    metrics[f"{name}_accuracy"] = result.metrics["accuracy"]
        self.losses.train()
        return metrics


def _unsaid(data: EvalSet) -> Unsaid:
    found = unsaid(data)
    if isinstance(found, str):
        raise UserError(f"eval.best: keyword_ap cannot be measured on data.val: {found}")
    return found


def fixed_batches(run: Run, prepared: Prepared, comm: Comm) -> tuple[list[tuple[int, Any]], int]:
    """This worker's fixed validation micro-batches with their numbers, and how many there are over all workers."""
    maker = SampleMaker(run, prepared.vocabulary, training=False)
    index, micro = prepared.indexes["val"], run.batch.micro
    n = min(run.eval.batches, len(index) // micro)
    samples, dropped = [], Counter[str]()
    for row in pipeline.iterate_rows(index, limit=n * micro):
        try:
            samples.append((row["uid"], maker(row, 0)))
        except DropRow as drop:
            dropped[drop.reason] += 1
    if not samples:
        why = ", ".join(f"{reason} {k}" for reason, k in sorted(dropped.items()))
        raise UserError(f"data.val: none of the first {n * micro} rows can be used ({why})")
    n = max(1, len(samples) // micro)
    parts = [samples[i * micro : (i + 1) * micro] for i in range(n)]
    mine = [
        (i, collate(stacked([s for _, s in part]), run)) for i, part in enumerate(parts) if i % comm.world == comm.rank
    ]
    return mine, n

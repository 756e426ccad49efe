"""All tasks over one set of rows; their results as JSON, as a summary, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from simla_ray.errors import UserError
from simla_ray.evaluation import grounding, keywords, match, retrieval, words
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.table import table
from simla_ray.evaluation.work import Gather, Work
from simla_ray.types import EvalResult

TASKS: dict[str, Callable[..., EvalResult | None]] = {
    "retrieval": retrieval.measure,
    "match": match.measure,
    "grounding": grounding.measure,
    "keywords": keywords.measure,
    "words": words.measure,
}


def evaluate(
    scorer: Scorer,
    rows: Sequence[Mapping[str, Any]],
    *,
    tasks: Sequence[str] | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather = lambda own: [own],
    tokenizer: nn.Module | None = None,
) -> dict[str, EvalResult]:
    """Run the tasks. Collective: every rank calls it and gets all results, the same for any number of ranks.

    Beside the tasks there is ``data``: rows, images, captions, and ``dropped`` rows by reason. A task that the run's
    objectives or the rows' columns do not allow is absent.

    Args:
        rows: this rank's, i.e. rows rank, rank + world, ... of the set, all columns, under our names.
        tasks: None for all.
        gather: object of this rank -> the objects of all ranks, in rank order.
        tokenizer: pictures (n, 3, px, px) uint8 -> codes (n, P), for the accuracy of MIM.

    Raises:
        UserError: an unknown task, or no row that can be used.
    """
    wanted = list(TASKS) if tasks is None else list(tasks)
    for name in wanted:
        if name not in TASKS:
            raise UserError(f"tasks: {name} is not one of {', '.join(TASKS)}")
    scorer.eval_mode()
    data = EvalSet.load(scorer, rows, Work(rank, world, gather))
    counts = {"n_rows": data.n_rows, "n_images": len(data), "n_captions": len(data.captions), "dropped": data.dropped}
    results = {"data": EvalResult("data", counts)}
    for name, task in TASKS.items():
        if name in wanted:
            result = (partial(task, tokenizer=tokenizer) if name == "words" else task)(data)
            if result is not None:
                results[name] = result
    return results


def to_json(results: Mapping[str, EvalResult]) -> dict[str, dict[str, Any]]:
    """``{task: {"metrics": ..., "examples": ...}}``, plain JSON."""
    return {name: {"metrics": result.metrics, "examples": result.examples} for name, result in results.items()}


def summary(results: Mapping[str, EvalResult]) -> dict[str, dict[str, Any]]:
    """``{task: metrics}``"""
    return {name: result.metrics for name, result in results.items()}


__all__ = ["TASKS", "evaluate", "summary", "table", "to_json"]

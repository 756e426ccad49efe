"""All tasks over one set of rows; their results as JSON, as a summary, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from simla_ray.errors import UserError
from simla_ray.evaluation import (
    classification,
    grounding,
    keywords,
    match,
    questions,
    ratings,
    retrieval,
    statements,
    words,
)
from simla_ray.evaluation.blind import Blind
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.ratings import Ratings
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.table import table
from simla_ray.evaluation.work import Gather, Work
from simla_ray.types import EvalResult, with_intervals

#: Name -> what measures it, or says in a few words which objective, column or option is missing.
TASKS: dict[str, Callable[..., EvalResult | str]] = {
    "retrieval": retrieval.measure,
    "match": match.measure,
    "grounding": grounding.measure,
    "keywords": keywords.measure,
    "words": words.measure,
    "classification": classification.measure,
    "ratings": ratings.measure,
    "vqa": questions.measure,
    "statements": statements.measure,
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
    blind: Blind | None = None,
    templates: Sequence[str] = classification.TEMPLATES,
    rated: tuple[Ratings, Sequence[Mapping[str, Any]]] | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, EvalResult]:
    """Run the tasks. Collective: every rank calls it and gets all results, the same for any number of ranks.

    Beside the tasks there is ``data``: rows, images, captions, ``dropped`` rows by reason, and ``not_run``: the tasks
    that the run's objectives or the rows' columns do not allow, which are absent, and what is missing.

    Args:
        rows: this rank's, i.e. rows rank, rank + world, ... of the set, all columns, under our names.
        tasks: None for all.
        gather: object of this rank -> the objects of all ranks, in rank order.
        tokenizer: pictures (n, 3, px, px) uint8 -> codes (n, P), for the accuracy of MIM.
        blind: the baselines of a fine-tuned task.
        templates: prompts of a class, with {} for its name.
        rated: people's ratings of images and captions, and this rank's share of the rated rows, see ``ratings``.
        layers: of grounding's maps; None for all.

    Raises:
        UserError: an unknown task or layer, or no row that can be used.
    """
    wanted = list(TASKS) if tasks is None else list(tasks)
    check_tasks(wanted)
    scorer.eval_mode()
    data = EvalSet.load(scorer, rows, Work(rank, world, gather))
    counts: dict[str, Any] = {"n_rows": data.n_rows, "n_images": len(data), "n_captions": len(data.captions)}
    counts |= {"dropped": data.dropped, "not_run": {}}
    results = {"data": EvalResult("data", counts, uids=tuple(item.uid for item in data.items))}
    options: dict[str, dict[str, Any]] = {
        "words": {"tokenizer": tokenizer},
        "grounding": {"layers": layers},
        "classification": {"templates": templates},
        "ratings": {"given": rated},
        "vqa": {"blind": blind},
        "statements": {"blind": blind},
    }
    for name, task in TASKS.items():
        if name in wanted:
            result = task(data, **options.get(name, {}))
            if isinstance(result, EvalResult):
                results[name] = result
            else:
                counts["not_run"][name] = result
    return results


def check_tasks(names: Sequence[str]) -> None:
    """
    Raises:
        UserError: one of them is unknown.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"tasks: {name} is not one of {', '.join(TASKS)}")


def to_json(results: Mapping[str, EvalResult]) -> dict[str, dict[str, Any]]:
    """``{task: {"metrics": ..., "intervals": ..., "examples": ...}}``, plain JSON."""
    return {
        name: {"metrics": result.metrics, "intervals": result.intervals, "examples": result.examples}
        for name, result in results.items()
    }


def summary(results: Mapping[str, EvalResult]) -> dict[str, dict[str, Any]]:
    """``{task: metrics}``, the intervals among them as ``intervals``."""
    return {name: with_intervals(result.metrics, result.intervals) for name, result in results.items()}


__all__ = ["TASKS", "check_tasks", "evaluate", "summary", "table", "to_json"]

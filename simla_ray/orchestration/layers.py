"""Which cross-attention layers grounding reads: all, some by number, or those that point best on validation data."""

from __future__ import annotations

from dataclasses import dataclass

from simla_ray.data import pipeline
from simla_ray.data.index import Index
from simla_ray.errors import UserError
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.grad_cam import Layers, checked_layers
from simla_ray.evaluation.grounding import best_layers, layer_scores
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.work import Work
from simla_ray.orchestration.prepare import index_of
from simla_ray.training.comm import Comm

ALL, AUTO = "all", "auto"


@dataclass(frozen=True)
class Chosen:
    """``layers``: None for all. ``scores``: pointing on validation data by layers, where they were chosen by it."""

    layers: Layers | None
    scores: dict[str, float] | None = None


def numbers_of(text: str, allowed: str = "all, auto") -> Layers | None:
    """``all`` -> None, ``5,8`` -> (5, 8).

    Raises:
        UserError: neither of them.
    """
    if text == ALL:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--layers: {text}; give {allowed}, or numbers from 0 such as 5,8") from None


def chosen_layers(text: str, scorer: Scorer, evaluated: Index, comm: Comm) -> Chosen:
    """The layers that ``--layers`` means. Collective.

    ``auto`` reads the run's validation set, ``eval.pairs`` rows of it at most.

    Args:
        evaluated: the rows that the layers will be measured on.

    Raises:
        UserError: unknown layers; with auto, a validation set without phrases, or one that shares rows with
            ``evaluated``.
    """
    if text != AUTO or "itm" not in scorer.active:
        return Chosen(None if text == AUTO else _known(text, scorer))
    index = index_of(scorer.run, "val")
    if _overlap(index, evaluated):
        raise UserError(
            "--layers: auto would choose on the rows that are evaluated, for they are the run's validation set; "
            "give other --data, or layers by number"
        )
    rows = list(pipeline.iterate_rows(index, comm.rank, comm.world, scorer.run.eval.pairs))
    scores = layer_scores(EvalSet.load(scorer, rows, Work(comm.rank, comm.world, comm.gather)))
    names = {layers: ", ".join(map(str, layers)) for layers in scores}
    return Chosen(best_layers(scores), {names[layers]: score for layers, score in scores.items()})


def _known(text: str, scorer: Scorer) -> Layers | None:
    numbers = numbers_of(text)
    return numbers if numbers is None or "itm" not in scorer.active else checked_layers(scorer, numbers)


def _overlap(first: Index, second: Index) -> bool:
    """Whether two indexes share a row."""
    rows = {(u.path, u.number): set(u.rows if u.rows is not None else range(u.n)) for u in first.units}
    return any(
        not rows.get((u.path, u.number), set()).isdisjoint(u.rows if u.rows is not None else range(u.n))
        for u in second.units
    )

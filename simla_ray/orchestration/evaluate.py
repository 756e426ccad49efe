"""Evaluate a finished or running run, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from simla_ray.data import pipeline
from simla_ray.data.index import build_index
from simla_ray.data.text import Vocabulary
from simla_ray.errors import UserError
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.tasks import evaluate
from simla_ray.orchestration.prepare import index_of, load_tokenizer
from simla_ray.orchestration.runs import find_run, load_trained
from simla_ray.types import EvalResult


def evaluate_run(
    path: Path,
    tasks: Sequence[str] = (),
    storage: Path = Path("runs"),
    data: Sequence[str] | None = None,
    split: str | None = None,
) -> dict[str, EvalResult]:
    """Evaluate the best checkpoint of a run, or an exported folder.

    Args:
        tasks: names; none for all that the run and the data allow.
        data: files to evaluate on in place of the run's test set, with ``split`` as their filter.

    Raises:
        UserError: no such run, task or file.
    """
    if split is not None and not data:
        raise UserError(f"--split: {split} is a filter of --data, which is missing")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, model, prepared = load_trained(find_run(path, storage), device)
    vocabulary = Vocabulary.load(prepared)
    index = build_index(data, split, run.data.image_roots, "--data") if data else index_of(run, "test")
    tokenizer = load_tokenizer(run, prepared)
    if tokenizer is not None:
        tokenizer = tokenizer.to(device)
    rows = list(pipeline.iterate_rows(index, limit=run.eval.pairs))
    return evaluate(Scorer(run, model, vocabulary, device), rows, tasks=list(tasks) or None, tokenizer=tokenizer)

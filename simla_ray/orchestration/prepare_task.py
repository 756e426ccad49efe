"""What a fine-tuned task needs beside vocabulary and codes: its known answers, and baselines that see no image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simla_ray.config.schema import Run
from simla_ray.data.index import Index
from simla_ray.data.questions import asked_column, frequent_answers, task_columns
from simla_ray.data.schema import training_columns
from simla_ray.data.sources import read_rows
from simla_ray.data.text import Vocabulary
from simla_ray.errors import UserError
from simla_ray.evaluation.blind import Blind

#: Questions or statements that the baselines learn from, at most.
FIT_TEXTS = 50_000


def add_task(run: Run, indexes: Mapping[str, Index], vocabulary: Vocabulary, folder: Path) -> None:
    """Give the vocabulary the answers of the training questions, and fit the baselines into ``folder``.

    Raises:
        UserError: no row of a set has a question or a statement that can be used.
    """
    for name, index in indexes.items():
        if next(_entries(run, index), None) is None:
            labels = run.objectives.labels
            of = f", with one of the labels {', '.join(labels.classes)}," if labels is not None else ""
            raise UserError(
                f"data.{name}: no row has {asked_column(task_columns(run))}{of} that can be used for task={run.task}"
            )
    entries = list(_entries(run, indexes["train"]))
    if run.objectives.answers is not None:
        vocabulary.answers = tuple(frequent_answers(entries, run.objectives.answers.most))
    chosen = [entries[i] for i in np.random.default_rng([run.seed, 17]).permutation(len(entries))[:FIT_TEXTS]]
    texts = [entry.get("question") or entry.get("text") or "" for entry in chosen]
    answers = [entry.get("answers") or [entry["label"]] for entry in chosen]
    Blind.fit(texts, answers, run.seed).save(folder)


def _entries(run: Run, index: Index) -> Iterator[dict[str, Any]]:
    """Questions, or statements with one of the run's labels, of a set's rows; no image is read."""
    column, labels = asked_column(task_columns(run)), run.objectives.labels
    assert column is not None
    columns = [name for name in training_columns([column]) if name != "image"]
    for unit in index.units:
        for row in read_rows(unit, np.arange(len(unit)), columns, index.roots):
            for entry in row.get(column) or ():
                if labels is None or entry["label"] in labels.classes:
                    yield entry

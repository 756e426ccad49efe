"""Evaluate a finished or running run, in this process or in workers, or score pairs with it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.concept_source import check_phrases
from simla_ray.data.concept_tokens import concept_columns
from simla_ray.data.convert.progress import Progress
from simla_ray.data.index import Index, build_index
from simla_ray.data.regions import region_columns
from simla_ray.data.schema import training_columns
from simla_ray.data.sources import read_column, read_pieces, read_rows
from simla_ray.data.sources.files import absolute
from simla_ray.data.tags import tag_columns
from simla_ray.data.text import Vocabulary
from simla_ray.errors import UserError
from simla_ray.evaluation.blind import Blind
from simla_ray.evaluation.classification import TEMPLATES, read_templates
from simla_ray.evaluation.pairs import score_pairs
from simla_ray.evaluation.ratings import Ratings, read_ratings
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.tasks import check_tasks, evaluate
from simla_ray.orchestration.layers import ALL, Chosen, chosen_layers
from simla_ray.orchestration.prepare import index_of, load_tokenizer
from simla_ray.orchestration.runs import find_run, load_trained
from simla_ray.release.source import find_source
from simla_ray.training.comm import Comm
from simla_ray.types import EvalResult

LABEL = "label"
#: Columns of the file of scores.
SCORES = ("uid", "image", "caption", "itc", "itm", "dropped")


def evaluate_run(
    path: Path,
    tasks: Sequence[str] = (),
    storage: Path = Path("runs"),
    data: Sequence[str] | None = None,
    split: str | None = None,
    *,
    images: Sequence[Path] = (),
    label_column: str | None = None,
    templates: Sequence[str] = (),
    ratings: Path | None = None,
    layers: str = ALL,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, EvalResult]:
    """Evaluate the best checkpoint of a run, or an exported folder.

    Args:
        tasks: names; none for all that the run and the data allow.
        data: files to evaluate on in place of the run's test set, with ``split`` as their filter.
        images: folders that lists of ``data`` may name images in; none for those of the run.
        label_column: column with the class of a row, by its name in the files; None for ``label``, if there is one.
        templates: prompts of a class, or files of them; none for ``TEMPLATES``.
        ratings: file of people's ratings, see ``read_ratings``; of all rows, however many ``eval.pairs`` are evaluated.
        layers: of grounding: all, auto (chosen on the run's validation set), or numbers such as 5,8.
        workers: Ray Train workers that share the rows, the numbers are the same for any; None: this process.

    Raises:
        UserError: no such run, task, column, file or layer; no room for the workers.
    """
    for option, value in (("--split", split), ("--images", ", ".join(map(str, images)))):
        if value and not data:
            raise UserError(f"{option}: {value} is about --data, which is missing")
    for option, given, task in (
        ("--label-column", label_column, "classification"),
        ("--templates", templates, "classification"),
        ("--ratings", ratings, "ratings"),
    ):
        if given and tasks and task not in tasks:
            raise UserError(f"{option}: is about the task {task}; found tasks {' '.join(tasks)}")
    folder = find_run(path, storage)
    run = find_source(folder).run
    assert run is not None
    check_tasks(tasks)
    roots = _folders(images) or run.data.image_roots
    index = build_index([absolute(uri) for uri in data], split, roots, "--data") if data else index_of(run, "test")
    check_phrases(run, {"--data" if data else "data.test": index})
    evaluation = Evaluation(
        folder,
        index,
        tuple(tasks),
        label_column,
        tuple(read_templates(templates)) if templates else TEMPLATES,
        read_ratings(ratings) if ratings is not None else None,
        layers,
        ", ".join(data) if data else "the test set",
    )
    if workers is not None:
        from simla_ray.orchestration.in_workers import in_workers  # Ray Train, which nothing else here needs

        return in_workers(evaluation, run, workers, folder, say)
    return evaluation(Comm(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, on which rows, how: all that a worker has to know.

    Args:
        folder: absolute, of a run or an exported model.
        where: what the rows are called in an error.
    """

    folder: Path
    index: Index
    tasks: tuple[str, ...]
    label_column: str | None
    templates: Sequence[str]
    ratings: Ratings | None
    layers: str
    where: str

    def __call__(self, comm: Comm, device: torch.device) -> dict[str, EvalResult]:
        """Collective: every rank evaluates its share of the rows, and gets the results of all.

        Raises:
            UserError: the same on every rank.
        """
        run, scorer, prepared = _opened(self.folder, device)
        tokenizer = load_tokenizer(run, prepared)
        if tokenizer is not None:
            tokenizer = tokenizer.to(device)
        rows = list(pipeline.iterate_rows(self.index, comm.rank, comm.world, run.eval.pairs))
        labels = islice(_labels(self.index, self.label_column or LABEL), comm.rank, None, comm.world)
        for row, label in zip(rows, labels, strict=False):
            # The label of a row with statements says whether they hold: no class of its image, unless somebody says so.
            if self.label_column is not None or not row.get("statements"):
                row[LABEL] = label
        if self.label_column is not None and not any(comm.gather(any(row[LABEL] is not None for row in rows))):
            raise UserError(f"--label-column: {self.label_column} has no value in {self.where}")
        grounds = not self.tasks or "grounding" in self.tasks
        chosen = chosen_layers(self.layers, scorer, self.index, comm) if grounds else Chosen(None)
        rated = None
        if self.ratings is not None:
            rated = self.ratings, _rated_rows(self.index, self.ratings)[comm.rank :: comm.world]
        results = evaluate(
            scorer,
            rows,
            tasks=self.tasks or None,
            rank=comm.rank,
            world=comm.world,
            gather=comm.gather,
            tokenizer=tokenizer,
            blind=Blind.load(prepared),
            templates=self.templates,
            rated=rated,
            layers=chosen.layers,
        )
        if chosen.scores is not None and "grounding" in results:
            results["grounding"].metrics["pointing_on_validation"] = chosen.scores
        return results


def score_file(
    path: Path,
    uris: Sequence[str],
    out: Path,
    storage: Path = Path("runs"),
    say: Callable[[str], None] = print,
    *,
    images: Sequence[Path] = (),
) -> dict[str, Any]:
    """Score every pair of image and caption in some files with a run; a line of ``SCORES`` for each, in their order.

    Rows are read and scored as they come, so memory holds few pictures (a list in JSON or CSV is read whole, its
    pictures are not); what cannot be scored is in the file with the reason. The file appears when it is whole; until
    then what there is of it has ``.unfinished`` behind its name.

    Args:
        uris: files of any format that training reads.
        out: CSV to write.
        images: folders that lists may name images in; none for the folder of the list.

    Returns:
        ``{"pairs", "scored", "dropped": {reason: n}}``

    Raises:
        UserError: no such run or file, or ``out`` cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, scorer, _ = _opened(find_run(path, storage), device)
    index = build_index(list(uris), None, _folders(images), "--score")
    check_phrases(run, {"--score": index})
    columns = training_columns((*region_columns(run), *concept_columns(run), *tag_columns(run)))
    if out.resolve() in {Path(unit.path).resolve() for unit in index.units}:
        raise UserError(f"--out: {out} is one of the files to score; give another name")
    dropped: Counter[str] = Counter()
    pairs = read = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        for unit in index.units:
            for _, piece in read_pieces(unit, np.arange(len(unit)), columns, index.roots):
                for row in piece:
                    read += 1
                    yield row

    unfinished = out.with_name(out.name + ".unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file, Progress(len(index), 0, lambda: read, say):
            writer = csv.writer(file)
            writer.writerow(SCORES)
            for one in score_pairs(scorer, rows()):
                scores = ["" if score is None else f"{score:.6f}" for score in (one.itc, one.itm)]
                writer.writerow([one.pair.uid, one.pair.name, one.pair.caption, *scores, one.dropped])
                pairs += 1
                if one.dropped:
                    dropped[one.dropped] += 1
        unfinished.replace(out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error})") from None
    return {"pairs": pairs, "scored": pairs - dropped.total(), "dropped": dict(sorted(dropped.items()))}


def _folders(images: Sequence[Path]) -> Sequence[Path]:
    for folder in images:
        if not folder.is_dir():
            raise UserError(f"--images: {folder} is no folder")
    return images


def _opened(folder: Path, device: torch.device) -> tuple[Run, Scorer, Path]:
    """Config, model, and the folder of vocabulary and codes."""
    run, model, prepared = load_trained(folder, device)
    return run, Scorer(run, model, Vocabulary.load(prepared), device), prepared


def _labels(index: Index, column: str) -> Iterator[Any]:
    """The values of a column, row by row; None where there is none."""
    for unit in index.units:
        values = read_column(unit, column) or [None] * unit.n
        yield from values if unit.rows is None else (values[i] for i in unit.rows)


def _rated_rows(index: Index, ratings: Ratings) -> list[dict[str, Any]]:
    """The rows that somebody rated, with every column."""
    rows = []
    for unit in index.units:
        names = read_rows(unit, np.arange(len(unit)), ("uid", "image_id"), index.roots)
        places = np.array([i for i, row in enumerate(names) if ratings.name_of(row) is not None], np.int64)
        if len(places):
            rows += [row for _, piece in read_pieces(unit, places, None, index.roots) for row in piece]
    return rows

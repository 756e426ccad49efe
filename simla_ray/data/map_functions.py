"""The map functions of the Ray datasets: what their tasks do, on any node of the cluster. No Ray in here.

The two stages of the training stream take and give Arrow tables (``blocks.py``), the preparing jobs columns.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from simla_ray.config.schema import Run
from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.blocks import block_table, rows_table, table_rows
from simla_ray.data.codes import Featurise, pixel_patches
from simla_ray.data.concept_tokens import column_phrases, concept_columns, phrases_in
from simla_ray.data.decode import DropRow, decode
from simla_ray.data.draws import stable_hash
from simla_ray.data.index import Index
from simla_ray.data.order import Order, Window
from simla_ray.data.questions import asked_column, task_columns
from simla_ray.data.regions import WHOLE
from simla_ray.data.sample import Sample, SampleMaker, stacked
from simla_ray.data.schema import OF_CONCEPTS, OF_REGIONS, training_columns
from simla_ray.data.sources import read_rows, read_words
from simla_ray.data.text import Vocabulary, clean

#: Rows of a lane before the next lane's turn, and samples that are made at once: few, so that no batch waits long.
BLOCK_ROWS = 128
NONE = np.empty(0, dtype=np.int64)


class WindowReader:
    """Rounds of windows in, encoded rows in the order of training out.

    The lanes of a round take turns, ``BLOCK_ROWS`` rows each: a worker with several lanes never waits for one of them
    while the rows of another pile up.

    Args:
        repeated: (n,) sorted ordinals of rows whose uid an earlier row has; they are dropped.
        columns: those that the run reads beside pretraining's, see ``questions.task_columns``.
    """

    def __init__(self, index: Index, order: Order, repeated: np.ndarray = NONE, columns: Sequence[str] = ()):
        self.index, self.order, self.repeated = index, order, repeated
        self.columns = training_columns(columns)
        self.asked = asked_column(columns)
        self.beside = tuple(name for name in dict.fromkeys(OF_REGIONS + OF_CONCEPTS) if name in columns)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for windows in batch.column("windows").to_pylist():
            yield from self.read([Window(*window) for window in windows])

    def read(self, windows: Iterable[Window]) -> Iterator[pa.Table]:
        """The rows of a round, see ``blocks.rows_table``."""
        lanes: dict[int, list[dict[str, Any]]] = {}
        for window in windows:
            lanes.setdefault(window.lane, []).extend(self._rows(window))
        for i in range(0, max(len(rows) for rows in lanes.values()), BLOCK_ROWS):
            for rows in lanes.values():
                if i < len(rows):
                    yield rows_table(rows[i : i + BLOCK_ROWS])

    def _rows(self, window: Window) -> list[dict[str, Any]]:
        times, ordinals = np.divmod(self.order.ordinals(window), len(self.index))
        repeated = np.isin(ordinals, self.repeated)
        rows: list[dict[str, Any]] = [{}] * len(ordinals)
        for unit, places, where in self.index.locate(ordinals):
            for i, row in zip(where.tolist(), read_rows(unit, places, self.columns, self.index.roots), strict=True):
                rows[i] = {
                    "lane": window.lane,
                    "epoch": window.epoch,
                    "offset": window.start + i,
                    "time": int(times[i]),
                    "uid": row["uid"],
                    "image_id": row["image_id"],
                    "captions": row["captions"],
                    **_image(row["image"] if not repeated[i] else "uid_duplicate"),
                }
                rows[i] |= {name: row.get(name) for name in self.beside}
                if self.asked:
                    rows[i] |= {"asked": json.dumps(row.get(self.asked)), "images": row.get("images")}
        return rows


def _image(image: Any) -> dict[str, Any]:
    if isinstance(image, Path):
        return {"path": str(image)}
    if isinstance(image, str):
        return {"reason": image}
    return {"image": image}


class BlockMaker:
    """Encoded rows in, blocks of samples out, see ``pipeline.training_stream``."""

    def __init__(self, run: Run, vocabulary: Vocabulary):
        # Every task gets a map function of its own; opening a large vocabulary for each would cost more than the rows.
        self.pickled = pickle.dumps((run, vocabulary))
        self.asked = asked_column(task_columns(run))

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        make = _maker_of(self.pickled)
        for i in range(len(batch)):
            yield self._block(table_rows(batch.slice(i, 1)), make)

    def _block(self, rows: list[dict[str, Any]], make: SampleMaker) -> pa.Table:
        samples: list[Sample | None] = []
        reasons: list[str] = []
        for row in rows:
            path, image = row["path"], row["image"]
            row["image"] = row["reason"] or (Path(path) if path is not None else image)
            if row["asked"] is not None:
                row[self.asked] = json.loads(row["asked"])
            try:
                samples.append(make(row, row["epoch"], row["time"]))
                reasons.append("")
            except DropRow as drop:
                samples.append(None)
                reasons.append(drop.reason)
        shape_of = next((s for s in samples if s is not None), None) or _blank(make)
        blank = {name: np.zeros_like(values) for name, values in shape_of.items()}
        block = stacked([s or blank for s in samples])
        block |= {name: np.array([row[name] for row in rows]) for name in ("lane", "epoch", "offset")}
        block |= {"uid": np.array([row["uid"] for row in rows]), "drop": np.array(reasons)}
        return block_table(block)


@functools.lru_cache(maxsize=1)
def _maker_of(pickled: bytes) -> SampleMaker:
    run, vocabulary = pickle.loads(pickled)
    return SampleMaker(run, vocabulary, training=True)


def _blank(make: SampleMaker) -> Sample:
    """A sample of the right shapes, for a block in which every row is dropped."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    image, run = buffer.getvalue(), make.run
    asked: dict[str, Any] = {"qas": [{"question": "a", "answers": make.vocabulary.answers[:1] or ["a"]}]}
    if run.objectives.labels is not None:
        asked = {"statements": [{"text": "a", "label": run.objectives.labels.classes[0]}], "images": [image, image]}
    if run.regions is not None:
        asked |= {"boxes": [WHOLE], "box_labels": [""], "region_feats": [[0.0] * (run.regions.width or 0)]}
    return make({"uid": "", "image_id": "", "image": image, "captions": ["a"], **asked}, 0)


class CaptionReader:
    """Numbers of units in; cleaned captions out, each with the hash of its row's uid and whether it is the row's first.

    A row without a word has one empty caption.
    """

    def __init__(self, index: Index, max_words: int):
        self.index, self.max_words = index, max_words

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for number in batch["unit"].tolist():
            found: list[tuple[str, int, bool]] = []
            for uid, captions in read_words(self.index.units[number], self.index.roots):
                cleaned = [clean(c, self.max_words) for c in captions]
                found += [(c, stable_hash(uid), i == 0) for i, c in enumerate([c for c in cleaned if c] or [""])]
            caption, uids, first = zip(*found, strict=True)
            yield {"caption": np.array(caption), "uid": np.array(uids), "first": np.array(first)}


class ConceptReader:
    """Numbers of units in; out the concepts that captions of each say, as JSON, by how many captions each is said, and
    the number of captions of the unit, beside the first of them.
    """

    def __init__(self, run: Run, index: Index):
        self.run, self.index = run, index

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        columns, most = ("uid", "captions", *concept_columns(self.run)), self.run.text.max_words
        for number in batch["unit"].tolist():
            unit, captions = self.index.units[number], 0
            counts: Counter[tuple[str, ...]] = Counter()
            for row in read_rows(unit, np.arange(len(unit)), columns, self.index.roots):
                given = column_phrases(row)
                for caption in filter(None, (clean(c, most) for c in row["captions"])):
                    captions += 1
                    counts.update(p.concept for p in phrases_in(caption.split(), given, self.run.concepts, most))
            found = {json.dumps(concept): n for concept, n in counts.items()} or {"[]": 0}
            yield {
                "concept": np.array(list(found)),
                "said": np.array(list(found.values())),
                "captions": np.array([captions] + [0] * (len(found) - 1)),
            }


class PatchReader:
    """Stretches of ``ordinals`` in, (n, d) features of the patches of their images out."""

    def __init__(self, run: Run, index: Index, ordinals: np.ndarray, featurise: Featurise | None):
        self.run, self.index, self.ordinals, self.featurise = run, index, ordinals, featurise

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        px = self.run.vision.image_px
        for first, last in zip(batch["first"].tolist(), batch["last"].tolist(), strict=True):
            images = []
            for unit, places, _ in self.index.locate(self.ordinals[first:last]):
                for row in read_rows(unit, places, ("uid", "image"), self.index.roots):
                    try:
                        images.append(to_array(evaluation_view(decode(row["image"], self.run.data.max_pixels), px)))
                    except DropRow:
                        continue  # counted where it is trained on
            if not images:
                continue
            featurise = self.featurise or (lambda x: pixel_patches(x, self.run.vision.patch_px))
            features = featurise(np.stack(images))
            yield {"features": features.reshape(-1, features.shape[-1])}

"""Do the scores order pairs of image and caption as people do? Rank correlation with ratings, as of Flickr8k-Expert."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simla_ray.data.text import clean
from simla_ray.errors import UserError
from simla_ray.evaluation.correlation import kendall_tau_b, mean_ranks, spearman
from simla_ray.evaluation.eval_set import EvalSet, Item, load_items, merge_images
from simla_ray.evaluation.examples import number, pick
from simla_ray.evaluation.intervals import bootstrap
from simla_ray.evaluation.work import interleave
from simla_ray.types import EvalResult

#: Columns that name the image; its uid, or what tells it as ``image_id``.
NAMES = ("uid", "image")
ENDINGS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".json": ""}


@dataclass(frozen=True)
class Ratings:
    """What people said: image name -> its (caption, rating) pairs, in the order of the file."""

    file: str
    of_image: dict[str, list[tuple[str, float]]]
    dropped: dict[str, int]

    def name_of(self, row: Mapping[str, Any]) -> str | None:
        """The name under which the ratings know a row; None for a row that nobody rated."""
        return next((name for name in (row["uid"], row["image_id"]) if name in self.of_image), None)


def read_ratings(path: Path) -> Ratings:
    """Ratings from CSV, TSV or JSON lines with the columns ``image`` or ``uid``, ``caption`` and ``rating``.

    Lines without an image's name, a caption or a finite rating are counted in ``dropped``.

    Raises:
        UserError: it cannot be read, lacks a column, or no line is left.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--ratings: {path} is none of {', '.join(ENDINGS)}")
    try:
        lines = _lines(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"--ratings: {path} cannot be read ({error})") from None
    there = set().union(*lines) if lines else set()
    for wanted in (NAMES, ("caption",), ("rating",)):
        if not there & set(wanted):
            found = ", ".join(sorted(map(str, there))) or "no line"
            raise UserError(f"--ratings: {path} has no column {' or '.join(wanted)}; found {found}")
    of_image: dict[str, list[tuple[str, float]]] = {}
    dropped: Counter[str] = Counter()
    for line in lines:
        name = next((str(line[key]) for key in NAMES if line.get(key) not in (None, "")), "")
        rating = _number(line.get("rating"))
        if not name:
            dropped["image_missing"] += 1
        elif rating is None:
            dropped["rating_unreadable"] += 1
        elif not clean(str(line.get("caption") or ""), 1):
            dropped["caption_empty"] += 1
        else:
            of_image.setdefault(name, []).append((str(line["caption"]), rating))
    if not of_image:
        raise UserError(f"--ratings: {path} has no line that can be used ({_counted(dropped)})")
    return Ratings(str(path), of_image, dict(dropped))


def measure(data: EvalSet, given: tuple[Ratings, Sequence[Mapping[str, Any]]] | None = None) -> EvalResult | str:
    """Spearman's rho and Kendall's tau-b of ITC's cosine and ITM's logit with the mean rating of each pair.

    Metrics: ``itc`` and ``itm``, where the run has them: ``{"spearman", "kendall"}``; ``n`` pairs, ``n_images``;
    ``dropped`` ratings by reason. Captions that are equal when cleaned are one pair. Intervals are over images. Without
    ratings, ITC and ITM, or two ratings that differ, the reason.

    Args:
        given: the ratings, and this rank's share of the rows that ``Ratings.name_of`` knows: rows rank, rank + world,
            ... of them, under our names.

    Raises:
        UserError: no rating is of a row that can be used.
    """
    if given is None:
        return "no --ratings"
    if not {"itc", "itm"} & data.active:
        return "no objective itc or itm"
    rated, target, dropped = _rated(data, *given)
    if np.ptp(target) == 0:
        return "all ratings are the same"
    image, text = rated.image_of_caption, rated.text_of_caption
    scores = {}
    if "itc" in data.active:
        scores["itc"] = (rated.image_vectors[image] * rated.text_vectors[text]).sum(1)
    if "itm" in data.active:
        scores["itm"] = rated.match_logits(image, text)
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, score in scores.items():
        ends = {}
        metrics[name] = {}
        for kind, measured in (("spearman", spearman), ("kendall", kendall_tau_b)):
            of_resamples = measured(np.nan_to_num(score), target)
            value = float(of_resamples(np.ones((1, len(target))))[0])
            metrics[name][kind] = value if math.isfinite(value) else 0.0  # equal scores order nothing
            if math.isfinite(value):
                ends[kind] = bootstrap(lambda w, of=of_resamples: of(w[:, image]), len(rated)).tolist()
        intervals[name] = ends
    metrics |= {"n": len(target), "n_images": len(rated), "dropped": dropped}
    return EvalResult("ratings", metrics, _examples(rated, target, scores), intervals)


def _rated(
    data: EvalSet, ratings: Ratings, rows: Sequence[Mapping[str, Any]]
) -> tuple[EvalSet, np.ndarray, dict[str, int]]:
    """The rated images with the rated captions in place of their own, (captions,) mean ratings, dropped ratings."""
    names = [str(ratings.name_of(row)) for row in rows]
    own = [
        dict(row) | {"captions": [caption for caption, _ in ratings.of_image[name]], "claims": None}
        for row, name in zip(rows, names, strict=True)
    ]
    loaded = interleave(data.work.gather(list(zip(names, load_items(data.scorer, own), strict=True))))
    dropped = Counter(ratings.dropped)
    items: dict[str, Item] = {}
    lost = {name: len(found) for name, found in ratings.of_image.items()}
    for name, item in loaded:
        n = lost.pop(name, 0)  # of several rows with the name of a rating the first is taken
        if isinstance(item, str):
            dropped[item] += n
        elif n:
            items[name] = item
    if lost:
        dropped["image_unknown"] += sum(lost.values())
    if not items:
        raise UserError(f"--ratings: {ratings.file} has no rating of a row that can be used ({_counted(dropped)})")
    max_words = data.run.text.max_words
    of_pair: dict[tuple[str, str], list[float]] = {}
    for name, item in items.items():
        for caption, rating in ratings.of_image[name]:
            of_pair.setdefault((item.image_id, clean(caption, max_words)), []).append(rating)
    merged = [_each_once(item) for item in merge_images(items.values())]
    rated = EvalSet(data.scorer, data.work, merged, len(loaded), {})
    owners = [rated.items[i].image_id for i in rated.image_of_caption]
    target = np.array([np.mean(of_pair[pair]) for pair in zip(owners, rated.captions, strict=True)])
    return rated, target, dict(sorted(dropped.items()))


def _each_once(item: Item) -> Item:
    """With no caption twice; what a column names in it is what it names at its first place."""
    captions = list(dict.fromkeys(item.captions))
    said = [item.said[item.captions.index(caption)] for caption in captions] if item.said is not None else None
    return replace(item, captions=captions, said=said)


def _examples(rated: EvalSet, target: np.ndarray, scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Half of them pairs that people and the model place alike: ranks that differ by no more than the median.

    ``place`` and ``human_place``: the share of the pairs that is not above it.
    """
    score = scores["itm"] if "itm" in scores else scores["itc"]
    place, human = (mean_ranks(values) / len(target) for values in (np.nan_to_num(score), target))
    gap = np.abs(place - human)
    examples = []
    for k in pick(gap <= np.median(gap)):
        i = int(rated.image_of_caption[k])
        example: dict[str, Any] = {
            "uid": rated.items[i].uid,
            "caption": rated.captions[k],
            "rating": number(target[k]),
            "hit": bool(gap[k] <= np.median(gap)),
            **{name: number(values[k]) for name, values in scores.items()},
            "place": number(place[k]),
            "human_place": number(human[k]),
        }
        examples.append(example | rated.picture(i))
    return examples


def _lines(path: Path) -> list[dict[str, Any]]:
    delimiter = ENDINGS[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", newline="") as file:
        if delimiter:
            reader = csv.DictReader(file, delimiter=delimiter)
            return [{name.strip(): cell for name, cell in line.items() if name} for line in reader]
        lines = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError("a line is no JSON object")
    return lines


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())) or "there is none"

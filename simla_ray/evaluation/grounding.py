"""Where the model looks for a phrase, scored by pointing and by boxes. The phrase is given as the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simla_ray.data.text import clean
from simla_ray.errors import UserError
from simla_ray.evaluation.boxes import FOUND_IOU, THRESHOLDS, areas, box_scores, boxes_around_peak, iou, usable
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.examples import number, pick, spread
from simla_ray.evaluation.grad_cam import Layers, checked_layers, cross_layers, layer_cams, over_layers
from simla_ray.evaluation.intervals import image_sums, mean_interval, mean_intervals
from simla_ray.evaluation.work import chunks_of
from simla_ray.types import EvalResult

MAX_PHRASES = 1000
PHRASES = 64
#: What a model that sees nothing could answer: the whole picture, and the middle of it, half as wide and half as high.
WHOLE, MIDDLE = np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([[0.25, 0.25, 0.75, 0.75]])


def points_inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """points (n, 2) x, y and boxes (m, 4) x1, y1, x2, y2 -> (n,) bool, inside any of them; edges count."""
    x, y = points[:, None, 0], points[:, None, 1]
    inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
    return np.any(inside, axis=1)


def patch_centres(grid: int) -> np.ndarray:
    """(P, 2) x, y of the patches' centres in 0..1, row-major."""
    along = (np.arange(grid) + 0.5) / grid
    return np.stack([np.tile(along, grid), np.repeat(along, grid)], axis=1)


@dataclass(frozen=True)
class Phrase:
    """``boxes`` (m, 4): where it is, at least one; ``candidates`` (k, 4): where it might be, of the row, maybe none."""

    item: int
    text: str
    boxes: np.ndarray
    candidates: np.ndarray


def phrases_of(data: EvalSet) -> tuple[list[Phrase], dict[str, int]]:
    """Every phrase that has words and boxes; ``MAX_PHRASES`` spread evenly over them where there are more.

    And how many were skipped and what was wrong with boxes: ``no_words``, ``no_boxes`` (among them phrases whose boxes
    are all bad), and what ``usable`` counts, of candidates as ``candidate_...``.
    """
    found, counts = [], Counter[str]()
    for i, item in enumerate(data.items):
        if not item.phrases:
            continue
        candidates, bad = usable(item.boxes)
        counts.update({f"candidate_{reason}": n for reason, n in bad.items()})
        for phrase in item.phrases:
            text = clean(str(phrase["text"] or ""), data.run.text.max_words)
            boxes, bad = usable(phrase["boxes"] if phrase["boxes"] is not None else [])
            counts.update(bad)
            if not text or not len(boxes):
                counts["no_boxes" if text else "no_words"] += 1
                continue
            found.append(Phrase(i, text, boxes, candidates))
    return [found[k] for k in spread(len(found), MAX_PHRASES)], dict(sorted(counts.items()))


def measure(data: EvalSet, layers: Sequence[int] | None = None) -> EvalResult | str:
    """Whether the heat map of a phrase points into its boxes, and whether a box read off it is one of them.

    Metrics, shares of the ``n`` phrases:

    - ``pointing``: the centre of the most relevant patch lies inside one of the phrase's boxes. Beside it ``chance`` (a
      random patch), ``center`` (the image's) and, where rows have ``boxes``, ``random_object`` (the centre of one of
      the image's objects).
    - ``box_accuracy``: the box around the map's peak at half its height overlaps one of the phrase's boxes with an IoU
      of at least 0.5. Beside it ``box_whole`` (the whole image) and ``box_middle`` (its middle, a quarter of the area).
    - ``candidate_accuracy``: the same of the best of the row's ``boxes``, over the ``candidate_n`` phrases of images
      that have some. Beside it ``candidate_random`` and ``candidate_largest``.

    A map that is zero everywhere is a miss. ``layers`` are those the maps were summed over; ``skipped`` counts phrases
    and boxes, see ``phrases_of``. Without ITM, or phrases that can be used, the reason.
    """
    if "itm" not in data.active:
        return "no objective itm"
    if not any(item.phrases for item in data.items):
        return "no column phrases"
    if not cross_layers(data.scorer):
        return "images are made of regions, not of patches"
    layers = checked_layers(data.scorer, layers)
    phrases, skipped = phrases_of(data)
    if not phrases:
        return f"no phrase has words and boxes: {', '.join(f'{reason} {n:,}' for reason, n in skipped.items())}"
    maps = over_layers(_maps(data, phrases, layers))
    heats = maps.reshape(len(maps), data.run.grid, data.run.grid)
    inside = np.stack([points_inside(patch_centres(data.run.grid), phrase.boxes) for phrase in phrases])
    proposed = boxes_around_peak(heats, THRESHOLDS[:1])[:, 0]
    hits = {
        "pointing": _points(maps, inside),
        "chance": inside.mean(axis=1),
        "center": np.array([points_inside(np.array([[0.5, 0.5]]), phrase.boxes)[0] for phrase in phrases]),
    }
    if all(len(phrase.candidates) for phrase in phrases):
        hits["random_object"] = np.array([_random_object(phrase) for phrase in phrases])
    hits |= {
        "box_accuracy": np.array([_finds(box[None], p)[0] for box, p in zip(proposed, phrases, strict=True)]),
        "box_whole": np.array([_finds(WHOLE, phrase)[0] for phrase in phrases]),
        "box_middle": np.array([_finds(MIDDLE, phrase)[0] for phrase in phrases]),
    }
    metrics: dict[str, Any] = {name: float(values.mean()) for name, values in hits.items()}
    metrics["n"] = len(phrases)
    images = np.array([phrase.item for phrase in phrases])
    intervals = mean_intervals({name: hits[name] for name in ("pointing", "box_accuracy")}, images)
    per_image = image_sums(hits, len(data), images)
    offered = np.array([len(phrase.candidates) > 0 for phrase in phrases])
    if offered.any():
        chosen = [(heat, phrase) for heat, phrase, there in zip(heats, phrases, offered, strict=True) if there]
        found = np.array([_by_candidates(heat, phrase) for heat, phrase in chosen])
        for name, values in zip(("accuracy", "random", "largest"), found.T, strict=True):
            metrics[f"candidate_{name}"] = float(values.mean())
            per_image |= image_sums({f"candidate_{name}": values}, len(data), images[offered])
        metrics["candidate_n"] = len(chosen)
        intervals["candidate_accuracy"] = mean_interval(found[:, 0], images[offered])
    metrics |= {"layers": list(layers), "skipped": skipped}
    examples = _examples(data, phrases, maps, hits["pointing"], proposed)
    return EvalResult("grounding", metrics, examples, intervals, per_image)


def layer_scores(data: EvalSet) -> dict[Layers, float]:
    """Pointing by all layers together, and by each of them alone.

    Raises:
        UserError: the rows have no phrase with words and boxes.
    """
    phrases = phrases_of(data)[0]
    if not phrases:
        raise UserError("layers: auto chooses by pointing, but no validation row has a phrase with boxes")
    every = cross_layers(data.scorer)
    cams = _maps(data, phrases, every)
    inside = np.stack([points_inside(patch_centres(data.run.grid), phrase.boxes) for phrase in phrases])
    scores = {every: float(_points(over_layers(cams), inside).mean())}
    return scores | {(layer,): float(_points(cam, inside).mean()) for layer, cam in zip(every, cams, strict=True)}


def best_layers(scores: Mapping[Layers, float]) -> Layers:
    """The layers that score highest; of equals all together, then the first."""
    return max(scores, key=lambda layers: (scores[layers], len(layers), -layers[0]))


def _maps(data: EvalSet, phrases: list[Phrase], layers: Layers) -> np.ndarray:
    """(layers, n, P). Collective."""
    chunks = chunks_of(len(phrases), PHRASES)
    parts = data.work.map(lambda c: _chunk_maps(data, [phrases[i] for i in c], layers), chunks)
    return np.nan_to_num(np.concatenate(parts, axis=1))


def _chunk_maps(data: EvalSet, phrases: list[Phrase], layers: Layers) -> np.ndarray:
    images, index = np.unique([phrase.item for phrase in phrases], return_inverse=True)
    tokens = data.scorer.image_tokens(data.images(images))
    ids, mask = data.scorer.tokenize([phrase.text for phrase in phrases])
    return layer_cams(data.scorer, tokens, torch.from_numpy(index).to(ids.device), ids, mask, layers).cpu().numpy()


def _points(maps: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Maps (n, P), inside (n, P) -> (n,) bool, whether the hottest patch is inside."""
    return inside[np.arange(len(maps)), maps.argmax(1)] & (maps.max(1) > 0)


def _finds(boxes: np.ndarray, phrase: Phrase) -> np.ndarray:
    """(m, 4) -> (m,) bool"""
    return iou(boxes, phrase.boxes).max(axis=1) >= FOUND_IOU


def _by_candidates(heat: np.ndarray, phrase: Phrase) -> tuple[float, float, float]:
    """Whether the map's candidate is right, a random one (the expectation), the largest."""
    right, scores = _finds(phrase.candidates, phrase), box_scores(heat, phrase.candidates)
    best = bool(right[scores.argmax()]) and scores.max() > 0
    return float(best), float(right.mean()), float(right[areas(phrase.candidates).argmax()])


def _random_object(phrase: Phrase) -> float:
    boxes = phrase.candidates
    return float(points_inside((boxes[:, :2] + boxes[:, 2:]) / 2, phrase.boxes).mean())


def _examples(
    data: EvalSet, phrases: list[Phrase], maps: np.ndarray, hits: np.ndarray, proposed: np.ndarray
) -> list[dict[str, Any]]:
    examples = []
    for k in pick(hits):
        phrase, grid = phrases[k], data.run.grid
        heat = (maps[k] / max(maps[k].max(), 1e-12)).reshape(grid, grid)
        example = {
            "uid": data.items[phrase.item].uid,
            "phrase": phrase.text,
            "boxes": [[number(v) for v in box] for box in phrase.boxes],
            "heat": [[number(v) for v in row] for row in heat],
            "hit": bool(hits[k]),
        }
        if areas(proposed[k]) > 0:
            example["proposed"] = [number(v) for v in proposed[k]]
            example["iou"] = number(iou(proposed[k][None], phrase.boxes).max())
        examples.append(example | data.picture(phrase.item))
    return examples

"""Where the model looks for a phrase: Grad-CAM over cross-attention, scored by pointing.

The phrase is given as the text. The official code (``Grounding.py``) reads one layer of twelve; the best single layer
changes from run to run and with few layers the last one is empty, so we sum over all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simla_ray.data.text import clean
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.examples import number, pick, spread
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.work import chunks_of
from simla_ray.models.precision import autocast
from simla_ray.models.stack import Attentions
from simla_ray.types import EvalResult

MAX_PHRASES = 1000
PHRASES = 64


def grad_cam(scorer: Scorer, image_tokens: Tensor, image_index: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Relevance of each patch for a match, (n, P) float32, at least 0.

    Per layer: attention probabilities x relu(their gradient of the ITM logit of a match), without the image's [CLS],
    mean over heads, sum over the text's real tokens; then the sum over layers.

    Args:
        image_tokens: (m, N, D); image_index: (n,) row of it that each text reads; ids, mask: (n, L).
    """
    assert scorer.model.itm_head is not None
    keep = Attentions(want_cross=True)
    with torch.enable_grad():
        # The tokens ask for a gradient so that there is a graph even where no parameter does.
        hidden = scorer.fuse(image_tokens.detach().requires_grad_(), image_index, ids, mask, keep)
        with autocast(scorer.run, scorer.device):
            logit = scorer.model.itm_head(hidden[:, 0])[:, 1]
        gradients = torch.autograd.grad(logit.float().sum(), keep.cross)
    return cam_of(keep.cross, gradients, mask)


def cam_of(probabilities: list[Tensor], gradients: tuple[Tensor, ...] | list[Tensor], mask: Tensor) -> Tensor:
    """Layers' (n, H, L, N) probabilities and gradients, mask (n, L) -> (n, P) float32."""
    rows = mask[:, None, :, None]
    total = torch.zeros((), device=mask.device)
    for probability, gradient in zip(probabilities, gradients, strict=True):
        cam = probability.detach().float() * gradient.float().relu() * rows
        total = total + cam[..., 1:].sum(2).mean(1)
    return total


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
    item: int
    text: str
    boxes: np.ndarray  # (m, 4), 0..1


def phrases_of(data: EvalSet) -> list[Phrase]:
    """Every phrase that has words and boxes; ``MAX_PHRASES`` spread evenly over them where there are more."""
    found = []
    for i, item in enumerate(data.items):
        for phrase in item.phrases:
            text = clean(str(phrase["text"] or ""), data.run.text.max_words)
            boxes = phrase["boxes"]
            if text and boxes is not None and len(boxes):
                found.append(Phrase(i, text, np.array([list(box) for box in boxes], dtype=np.float64)))
    return [found[k] for k in spread(len(found), MAX_PHRASES)]


def measure(data: EvalSet) -> EvalResult | None:
    """Share of phrases for which the centre of the most relevant patch lies inside one of the phrase's boxes.

    Metrics: ``pointing``; over the same phrases ``chance`` (a random patch), ``center`` (the image's) and, where rows
    have ``boxes``, ``random_object`` (the centre of one of the image's objects); ``n`` phrases. A map that is zero
    everywhere is a miss. None without ITM or phrases.
    """
    phrases = phrases_of(data) if "itm" in data.active else []
    if not phrases:
        return None
    chunks = chunks_of(len(phrases), PHRASES)
    maps = np.nan_to_num(np.concatenate(data.work.map(lambda c: _maps(data, [phrases[i] for i in c]), chunks)))
    inside = np.stack([points_inside(patch_centres(data.run.grid), phrase.boxes) for phrase in phrases])
    hits = inside[np.arange(len(phrases)), maps.argmax(1)] & (maps.max(1) > 0)
    metrics: dict[str, Any] = {
        "pointing": float(hits.mean()),
        "chance": float(inside.mean()),
        "center": float(np.mean([points_inside(np.array([[0.5, 0.5]]), phrase.boxes)[0] for phrase in phrases])),
    }
    if all(data.items[phrase.item].boxes for phrase in phrases):
        metrics["random_object"] = float(np.mean([_random_object(data, phrase) for phrase in phrases]))
    metrics["n"] = len(phrases)
    return EvalResult("grounding", metrics, _examples(data, phrases, maps, hits))


def _maps(data: EvalSet, phrases: list[Phrase]) -> np.ndarray:
    images, index = np.unique([phrase.item for phrase in phrases], return_inverse=True)
    tokens, _ = data.scorer.encode_images(data.images(images))
    ids, mask = data.scorer.tokenize([phrase.text for phrase in phrases])
    return grad_cam(data.scorer, tokens, torch.from_numpy(index).to(ids.device), ids, mask).cpu().numpy()


def _random_object(data: EvalSet, phrase: Phrase) -> float:
    boxes = np.array([list(box) for box in data.items[phrase.item].boxes], dtype=np.float64)
    return float(points_inside((boxes[:, :2] + boxes[:, 2:]) / 2, phrase.boxes).mean())


def _examples(data: EvalSet, phrases: list[Phrase], maps: np.ndarray, hits: np.ndarray) -> list[dict[str, Any]]:
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
        examples.append(example | data.picture(phrase.item))
    return examples

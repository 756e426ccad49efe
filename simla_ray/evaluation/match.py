"""How well ITM's logit tells a caption's own image from others."""

from __future__ import annotations

from typing import Any

import numpy as np

from simla_ray.evaluation.eval_set import IMAGES, EvalSet
from simla_ray.evaluation.examples import number, pick
from simla_ray.evaluation.intervals import bootstrap, image_sums
from simla_ray.evaluation.work import chunks_of
from simla_ray.types import EvalResult


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """Share of all (right, wrong) pairs in which the right one scores higher, ties counted half; exact, n log n.

    Args:
        right: (n,) scores; wrong: (m,) scores. Neither empty, no NaN.
    """
    below = np.searchsorted(np.sort(wrong), right, side="left")
    not_above = np.searchsorted(np.sort(wrong), right, side="right")
    return float((below + not_above).mean() / 2 / len(wrong))


def auc_interval(right: np.ndarray, wrong: np.ndarray, owner: np.ndarray) -> list[float]:
    """``[low, high]`` of ``auc``; what is drawn are images, each with its right score and its wrong ones.

    Args:
        right: (n,) scores, one an image; wrong: (m,) scores; owner: (m,) the image that each of them belongs to.
    """
    order = np.argsort(wrong, kind="stable")
    below, not_above = (np.searchsorted(wrong[order], right, side) for side in ("left", "right"))

    def of_resamples(weights: np.ndarray) -> np.ndarray:
        # How often wrong scores were drawn, up to each in ascending order.
        drawn = np.zeros((len(weights), len(wrong) + 1))
        np.cumsum(weights[:, owner[order]], axis=1, out=drawn[:, 1:])
        wins = (weights * (drawn[:, below] + drawn[:, not_above])).sum(1) / 2
        with np.errstate(invalid="ignore"):
            return wins / (weights.sum(1) * drawn[:, -1])

    return bootstrap(of_resamples, len(right)).tolist()


def auc_by_image(right: np.ndarray, wrong: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(n,) what each image gives to ``auc``, which is their mean, to first order also on resamples of the images.

    An image gives the share of the wrong scores that its right one beats, and for each of its wrong scores what the
    share of the right ones that beat it is above the mean (DeLong 1988; for clusters Obuchowski 1997).

    Args:
        as of ``auc_interval``.
    """
    beaten, beating = _beats(right, wrong), 1 - _beats(wrong, right)
    above = np.bincount(owner, beating - beating.mean(), len(right))
    return beaten + len(right) / len(wrong) * above


def _beats(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) share of the others that each score beats, ties counted half."""
    others = np.sort(others)
    return (np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")) / 2 / len(others)


def measure(data: EvalSet) -> EvalResult | str:
    """Area under the ROC curve, over the first caption of each image.

    Metrics: ``auc_random``, against one random wrong image per caption; ``auc_hard``, with ITC, against the most
    similar wrong image of each caption and the most similar wrong caption of each image; ``n`` true pairs. A pair that
    is known to be true as well is no wrong one: equal captions, and in the built-in world captions that the image
    satisfies. ``auc_hard`` can lie below one half: its wrong pairs are picked for looking right. Without ITM, or with
    nothing wrong to compare with, the reason.
    """
    if "itm" not in data.active:
        return "no objective itm"
    if len(data) < 2:
        return "one image only"
    n, everyone = len(data), np.arange(len(data))
    text = data.text_of_caption[data.first_caption]
    random_image = data.derangement()
    found = None
    hard_image = hard_text = np.zeros(0, np.int64)
    if "itc" in data.active:
        hard_image, hard_text, found = _hardest(data, text)
    image = np.concatenate([everyone, random_image, *([hard_image, everyone] if found is not None else [])])
    paired = np.concatenate([text, text, *([text, text[hard_text]] if found is not None else [])])
    logits = data.match_logits(image, paired)
    right, random_logits = logits[:n], logits[n : 2 * n]
    random_wrong = ~_known_true(data, text, random_image, everyone)
    metrics: dict[str, Any] = {"n": n}
    intervals = {}
    given = {}
    if random_wrong.any():
        wrong = random_logits[random_wrong]
        metrics["auc_random"] = auc(right, wrong)
        intervals["auc_random"] = auc_interval(right, wrong, everyone[random_wrong])
        given["auc_random"] = auc_by_image(right, wrong, everyone[random_wrong])
    shown_image, shown_logits = random_image, random_logits
    if found is not None and found.any():
        wrong = logits[2 * n :][found]
        metrics["auc_hard"] = auc(right, wrong)
        intervals["auc_hard"] = auc_interval(right, wrong, np.tile(everyone, 2)[found])
        given["auc_hard"] = auc_by_image(right, wrong, np.tile(everyone, 2)[found])
        shown_image, shown_logits = hard_image, logits[2 * n : 3 * n]
    if not intervals:
        return "no pair of image and caption that is wrong for certain"
    examples = _examples(data, right, shown_image, shown_logits)
    return EvalResult("match", metrics, examples, intervals, image_sums(given, n))


def _known_true(data: EvalSet, text: np.ndarray, image: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Whether the first caption of image ``owner`` is true of ``image`` as far as the data say; broadcast."""
    same = (image == owner) | (text[image] == text[owner])
    return same if data.satisfied is None else same | data.satisfied[image, data.first_caption[owner]]


def _hardest(data: EvalSet, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Most similar wrong image of each first caption (n,) and wrong first caption of each image (n,); (2n,) bool,
    whether there is such an image, such a caption."""
    images, captions = data.image_vectors, data.text_vectors[text]
    everyone = np.arange(len(data))[None, :]

    def search(chunk: range) -> tuple[np.ndarray, ...]:
        rows = np.asarray(chunk)[:, None]
        of_captions = captions[chunk] @ images.T
        of_captions[_known_true(data, text, everyone, rows)] = -np.inf
        of_images = images[chunk] @ captions.T
        of_images[_known_true(data, text, rows, everyone)] = -np.inf
        found = of_captions.max(1) > -np.inf, of_images.max(1) > -np.inf
        return of_captions.argmax(1), of_images.argmax(1), *found

    parts = data.work.map(search, chunks_of(len(data), IMAGES))
    image, caption, image_found, caption_found = (np.concatenate(column) for column in zip(*parts, strict=True))
    return image, caption, np.concatenate([image_found, caption_found])


def _examples(data: EvalSet, right: np.ndarray, wrong_image: np.ndarray, wrong: np.ndarray) -> list[dict[str, Any]]:
    examples = []
    for i in pick(right > wrong):
        other = int(wrong_image[i])
        example = {
            "uid": data.items[i].uid,
            "caption": data.items[i].captions[0],
            "logit": number(right[i]),
            "hit": bool(right[i] > wrong[i]),
            "wrong": {"uid": data.items[other].uid, "logit": number(wrong[i]), **data.picture(other)},
        }
        examples.append(example | data.picture(i))
    return examples

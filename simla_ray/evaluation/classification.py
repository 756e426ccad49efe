"""Zero-shot classification: the class whose name, put into prompt templates, is most similar to the image.

A class is the mean of its prompts' unit vectors, made a unit vector again (CLIP, section 3.1.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simla_ray.errors import UserError
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.examples import number, pick
from simla_ray.evaluation.intervals import bootstrap, image_sums, mean_intervals
from simla_ray.evaluation.retrieval import ranks
from simla_ray.evaluation.work import chunks_of
from simla_ray.types import EvalResult

TEMPLATES = ("a photo of a {}", "a picture of a {}", "{}")
#: Classes of a chunk of work.
CLASSES = 16
#: Classes shown for an image in the examples, and pairs of classes that are taken for each other.
SHOWN, CONFUSED = 5, 10


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Templates, each given as itself or in a file of one a line.

    Raises:
        UserError: one without ``{}``, which stands for the class; or a file that cannot be read.
    """
    found: list[str] = []
    for text in given:
        try:
            if "{}" in text or not Path(text).is_file():
                found.append(text)
                continue
            found += [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--templates: {text} cannot be read ({error})") from None
    for text in found:
        if "{}" not in text:
            raise UserError(f"--templates: {text!r} is no file and has no {{}}, where the name of the class goes")
    if not found:
        raise UserError(f"--templates: {', '.join(given)} holds no template")
    return tuple(found)


def measure(data: EvalSet, templates: Sequence[str] = TEMPLATES) -> EvalResult | str:
    """Accuracy over the images that have a ``label``; the classes are the labels there are, in alphabetical order.

    Metrics: ``accuracy``; ``class_accuracy``, mean of the classes' accuracies; ``top5``, where there are more than
    five classes; ``n`` images and ``unlabelled`` ones; ``classes``; ``chance``, one in ``classes``; ``majority``,
    share of the most frequent class; ``confused``, the pairs of classes that are taken for each other most often.
    Another class that scores the same as the true one counts as above it. Without ITC or two classes, the reason.
    """
    if "itc" not in data.active:
        return "no objective itc"
    labelled = [i for i, item in enumerate(data.items) if item.label is not None]
    classes = sorted({str(data.items[i].label) for i in labelled})
    if len(classes) < 2:
        return "no column label" if not labelled else f"all labels are {classes[0]}"
    place = {name: c for c, name in enumerate(classes)}
    truth = np.array([place[str(data.items[i].label)] for i in labelled])
    scores = np.nan_to_num(data.image_vectors[labelled] @ _class_vectors(data, classes, templates).T, nan=-np.inf)
    own = truth[:, None] == np.arange(len(classes))
    rank = ranks(scores, own)
    predicted = np.where(rank == 1, truth, np.where(own, -np.inf, scores).argmax(1))
    hits = {"accuracy": rank == 1} | ({"top5": rank <= 5} if len(classes) > 5 else {})

    def class_accuracy(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a resample may lack a class
            of_class = weights @ (own & hits["accuracy"][:, None]) / (weights @ own)
        return np.nanmean(of_class, axis=1)

    metrics: dict[str, Any] = {name: float(hit.mean()) for name, hit in hits.items()}
    metrics["class_accuracy"] = float(class_accuracy(np.ones((1, len(truth))))[0])
    metrics |= {"n": len(truth), "unlabelled": len(data) - len(truth), "classes": len(classes)}
    metrics |= {"chance": 1 / len(classes), "majority": float(own.sum(0).max() / len(truth))}
    metrics["confused"] = _confused(classes, truth, predicted)
    intervals = mean_intervals(hits) | {"class_accuracy": bootstrap(class_accuracy, len(truth)).tolist()}
    # To first order what each image gives to the mean of the classes, whose own means move with the images drawn.
    size = own.sum(0)
    above = hits["accuracy"] - (hits["accuracy"].astype(np.float64) @ own / size)[truth]
    given = metrics["class_accuracy"] + len(truth) / (len(classes) * size[truth]) * above
    per_image = image_sums(hits | {"class_accuracy": given}, len(data), np.array(labelled))
    examples = _examples(data, labelled, classes, predicted, scores)
    return EvalResult("classification", metrics, examples, intervals, per_image)


def _class_vectors(data: EvalSet, classes: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """(classes, E) unit rows"""

    def encode(chunk: range) -> np.ndarray:
        prompts = [template.replace("{}", classes[c].replace("_", " ")) for c in chunk for template in templates]
        vectors = data.scorer.encode_texts(prompts)[2].cpu().numpy()
        mean = vectors.reshape(len(chunk), len(templates), -1).mean(1)
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)

    return np.concatenate(data.work.map(encode, chunks_of(len(classes), CLASSES)))


def _confused(classes: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, Any]]:
    """``{"label", "predicted", "n"}``, the most frequent first, equally frequent ones in alphabetical order."""
    pairs = Counter((int(t), int(p)) for t, p in zip(truth, predicted, strict=True) if t != p)
    most = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:CONFUSED]
    return [{"label": classes[t], "predicted": classes[p], "n": n} for (t, p), n in most]


def _examples(
    data: EvalSet, labelled: Sequence[int], classes: Sequence[str], predicted: np.ndarray, scores: np.ndarray
) -> list[dict[str, Any]]:
    examples = []
    labels = [str(data.items[i].label) for i in labelled]
    for k in pick([classes[p] == label for p, label in zip(predicted, labels, strict=True)]):
        best = np.argsort(-scores[k], kind="stable")[:SHOWN]
        example = {
            "uid": data.items[labelled[k]].uid,
            "label": labels[k],
            "predicted": classes[predicted[k]],
            "hit": classes[predicted[k]] == labels[k],
            "top": [{"label": classes[c], "score": number(scores[k, c])} for c in best],
        }
        examples.append(example | data.picture(labelled[k]))
    return examples

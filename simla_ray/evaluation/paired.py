"""Two ways to train, each with the same few seeds: how far they differ, and how sure that is.

Two things move a difference: the images that it is measured on, of which there are hundreds, and the seeds, of which
there are three. Drawing the seeds with replacement as well would promise too much: the variance of resamples of three
values is a third too small, and they know nothing of tails (of simulated 95 % intervals 76 in 100 held the truth). So
images are drawn, and for the seeds Student's t stands. The two are put together as for readers and cases in radiology,
which is the same question (Obuchowski and Rockette 1995, with the degrees of freedom of Hillis 2007):

    variance = s^2 / S + max(0, c)        degrees of freedom = variance^2 / ((s^2 / S)^2 / (S - 1))

s is the standard deviation of the S seeds' differences, in which a seed's own luck with single images is counted
already. c is the covariance, over resamples of the images, between the differences of two seeds: the part that more
seeds would not take away. Where images decide, the interval is about that of a bootstrap; where seeds do, that of a
t-test over them. Of 1000 simulated comparisons of 3 seeds without a difference the interval held 0 in 93 % where seeds
make the noise, in 95 % where images do, in 94 % where it is the luck of single runs with single images; with 5 seeds in
94 to 96 %.

Three seeds leave two degrees of freedom: the interval reaches 4.3 standard errors to either side in place of 2, and a
difference is told from none only if it is larger than 2.5 times the spread of the seeds' differences. With five seeds
1.25 times are enough, with ten 0.7. One seed says nothing about seeds: its interval is about images alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from simla_ray.errors import UserError
from simla_ray.evaluation.intervals import LEVEL, resampled
from simla_ray.types import EvalResult

PER_IMAGE = "per_image.safetensors"
#: Points at which the distribution of t is integrated, and how far out, in standard errors.
POINTS, REACH = 20_001, 40.0


@dataclass(frozen=True)
class PerImage:
    """The evaluation of one run.

    ``metrics``: "<task>/<path>" -> value. ``sums``: the same names, those that have it, -> (images, 2) what each image
    gives, see ``EvalResult``; ``uids``: these images.
    """

    metrics: dict[str, float]
    uids: tuple[str, ...] = ()
    sums: dict[str, np.ndarray] = field(default_factory=dict)


def write_per_image(results: Mapping[str, EvalResult], folder: Path) -> None:
    """Write ``per_image.safetensors``, whole or not at all."""
    sums = {f"{task}/{name}": found for task, result in results.items() for name, found in result.per_image.items()}
    uids = results["data"].uids if "data" in results else ()
    temporary = folder / (PER_IMAGE + ".tmp")
    save_file(sums, temporary, {"uids": json.dumps(uids)})
    temporary.replace(folder / PER_IMAGE)


def read_per_image(folder: Path) -> PerImage:
    """The evaluation of a finished run; without ``sums`` where the folder has no such file.

    Raises:
        UserError: the run has no summary, or a file cannot be read.
    """
    try:
        metrics = dict(_numbers(json.loads((folder / "summary.json").read_text())["eval"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'summary.json'}: cannot be read ({error})") from None
    path = folder / PER_IMAGE
    if not path.exists():
        return PerImage(metrics)
    try:
        with safe_open(path, "numpy") as file:
            uids = tuple(json.loads((file.metadata() or {})["uids"]))
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for name, found in sums.items():
        if found.shape != (len(uids), 2):
            raise UserError(f"{path}: {name} has the shape {found.shape}, for {len(uids)} images it is {len(uids)}, 2")
    return PerImage(metrics, uids, sums)


def _numbers(metrics: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            if name != "intervals":
                yield from _numbers(value, f"{path}{name}/")
        elif isinstance(value, int | float):
            yield f"{path}{name}", value


def paired_difference(a: Sequence[PerImage], b: Sequence[PerImage], metric: str) -> dict[str, Any]:
    """How far a metric of runs ``a`` is above that of runs ``b``.

    Args:
        a, b: runs of two configs, with the same seeds in the same order.
        metric: "<task>/<path>", such as "retrieval/itc/t2i_r10".

    Returns:
        ``metric``; ``a``, ``b`` means over seeds; ``std_a``, ``std_b`` (n - 1 in the denominator; None of one seed);
        ``mean`` of the differences; ``low``, ``high`` of 95 %, see the head of this file; ``per_seed`` differences;
        ``seeds``; ``images`` that the interval is over. Where the runs do not know what the same images gave, the
        interval is that of Student's t over seeds, ``images`` is None, and with one seed so are the ends.

    Raises:
        ValueError: the sides do not have one run each for the same seeds, or a run lacks the metric.
    """
    if not a or len(a) != len(b):
        raise ValueError(f"{len(a)} runs cannot be paired with {len(b)}")
    if any(metric not in run.metrics for run in (*a, *b)):
        raise ValueError(f"{metric}: not every run has it")
    values = np.array([[run.metrics[metric] for run in side] for side in (a, b)], np.float64)
    differences = values[0] - values[1]
    sums = _of_same_images(a, b, metric)
    low, high = (None, None) if len(a) == 1 and sums is None else _interval(differences, sums)
    spread: list[float | None] = [None, None] if len(a) == 1 else values.std(axis=1, ddof=1).tolist()
    return {
        "metric": metric,
        "a": float(values[0].mean()),
        "b": float(values[1].mean()),
        "std_a": spread[0],
        "std_b": spread[1],
        "mean": float(differences.mean()),
        "low": low,
        "high": high,
        "per_seed": differences.tolist(),
        "seeds": len(differences),
        "images": None if sums is None else len(sums[0]),
    }


def _of_same_images(a: Sequence[PerImage], b: Sequence[PerImage], metric: str) -> np.ndarray | None:
    """(2 * seeds, images, 2) sums of a's runs, then b's, of the images that have a case; None where they do not fit."""
    runs = [*a, *b]
    if any(metric not in run.sums or run.uids != runs[0].uids for run in runs):
        return None
    sums = np.stack([run.sums[metric] for run in runs]).astype(np.float64)
    return sums[:, (sums[..., 1] > 0).any(axis=0)]


def _interval(differences: np.ndarray, sums: np.ndarray | None) -> tuple[float, float]:
    """Ends of an interval of LEVEL around the mean of the seeds' differences (S,); sums as of ``_of_same_images``."""
    seeds, mean = len(differences), float(differences.mean())
    of_images = None if sums is None else _resampled_differences(sums)
    if seeds == 1:
        assert of_images is not None
        outside = 50 * (1 - LEVEL)
        low, high = np.percentile(of_images[:, 0], [outside, 100 - outside])
        return float(low), float(high)
    of_seeds = float(differences.var(ddof=1)) / seeds
    shared = 0.0
    if of_images is not None:
        covariance = np.cov(of_images, rowvar=False)
        shared = max(0.0, float(covariance.sum() - np.trace(covariance)) / (seeds * (seeds - 1)))
    variance = of_seeds + shared
    freedom = (seeds - 1) * (variance / of_seeds) ** 2 if of_seeds else math.inf
    reach = t_quantile((1 + LEVEL) / 2, freedom) * math.sqrt(variance)
    return mean - reach, mean + reach


def _resampled_differences(sums: np.ndarray) -> np.ndarray:
    """(resamples, S) differences on the same images drawn for all runs; resamples without a case are left out."""

    def differences(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            metrics = weights @ sums[..., 0].T / (weights @ sums[..., 1].T)
        first, second = np.split(metrics, 2, axis=1)
        return first - second

    found = resampled(differences, sums.shape[1])
    return found[np.isfinite(found).all(axis=1)]


def t_quantile(p: float, freedom: float) -> float:
    """Where Student's t with so many degrees of freedom, at least 1, stays below with probability p (0.5 < p < 1).

    With t = sqrt(freedom) * tan(angle) the density is a power of the cosine, which is integrated along the angle.
    """
    root = math.sqrt(min(freedom, 1e9))
    angle = np.linspace(0, math.pi / 2 if root < REACH else math.atan(REACH / root), POINTS)
    density = np.cos(angle) ** (root**2 - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return root * math.tan(float(np.interp(2 * p - 1, area / area[-1], angle)))

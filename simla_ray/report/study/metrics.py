"""Names of metrics, and differences between two sets of runs in numbers and in words that claim no more than they show.

A metric's id is its place in a run's results ("retrieval/itc/t2i_r10"), or the bare name of a validation metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from simla_ray.report.results import DIRECTIONS, percent

RANKERS = {"itc": "ITC", "itm": "ITM", "itc_satisfied": "ITC, any that fits", "itm_satisfied": "ITM, any that fits"}
ARROWS = {"t2i": "text→image", "i2t": "image→text"}
#: Id -> (name on a page, name of a column).
NAMES = {
    "match/auc_random": ("Match AUC, random pairs", "match AUC"),
    "match/auc_hard": ("Match AUC, hard pairs", "match AUC, hard"),
    "grounding/pointing": ("Pointing accuracy", "pointing"),
    "grounding/box_accuracy": ("Box from the map, IoU 0.5", "box IoU 0.5"),
    "grounding/candidate_accuracy": ("Box among candidates, IoU 0.5", "candidates"),
    "keywords/ap": ("Unsaid words, average precision", "keyword AP"),
    "keywords/precision": ("Recommended words, precision", "kw precision"),
    "keywords/recall": ("Recommended words, recall", "kw recall"),
    "keywords/selected_precision": ("Keywords of the caption that are visible", "kw visible"),
    "words/color_right": ("Masked colour words", "colour words"),
    "words/mlm_accuracy": ("Masked words", "masked words"),
    "words/mim_accuracy": ("Masked patches' codes", "patch codes"),
    "classification/accuracy": ("Zero-shot class", "zero-shot"),
    "classification/class_accuracy": ("Zero-shot class, mean of the classes", "zero-shot, mean"),
    "ratings/itc/spearman": ("Human ratings, Spearman, ITC", "ratings ITC"),
    "ratings/itm/spearman": ("Human ratings, Spearman, ITM", "ratings ITM"),
    "vqa/accuracy": ("Answers to questions", "answers"),
    "statements/accuracy": ("Labels of statements", "labels"),
    "retrieval_r10": ("Validation R@10", "val R@10"),
    "itm_accuracy": ("Validation accuracy of ITM", "val itm"),
    "mlm_accuracy": ("Validation accuracy of MLM", "val mlm"),
    "mim_accuracy": ("Validation accuracy of MIM", "val mim"),
    "keyword_ap": ("Validation keyword AP", "val keyword AP"),
}

#: Two sets of runs beside each other, one metric: "a", "b", "mean" (a - b), "low", "high", "per_seed" and so on.
Difference = Mapping[str, Any]


def metric_name(metric: str) -> str:
    """What a page calls it; an id without a name is its own."""
    ranker, direction, recall = _recall(metric)
    if recall:
        return f"R@{recall} {DIRECTIONS[direction]}, {RANKERS[ranker]}"
    return NAMES[metric][0] if metric in NAMES else metric


def column_name(metric: str) -> str:
    """The same in few letters."""
    ranker, direction, recall = _recall(metric)
    if recall:
        return f"{RANKERS[ranker]} {ARROWS[direction]} R@{recall}"
    return NAMES[metric][1] if metric in NAMES else metric


def _recall(metric: str) -> tuple[str, str, str]:
    parts = metric.split("/")
    if len(parts) == 3 and parts[0] == "retrieval" and parts[1] in RANKERS:
        direction, _, recall = parts[2].partition("_r")
        if direction in DIRECTIONS and recall.isdigit():
            return parts[1], direction, recall
    return "", "", ""


def correlation(metric: str) -> bool:
    """Whether it lies in -1..1 and is no share."""
    return metric.startswith("ratings/")


def shown(metric: str, value: float | None) -> str:
    """``71.9 %``, or ``0.412`` of a correlation; a dash for what is not known."""
    if correlation(metric) and value is not None and math.isfinite(value):
        return f"{value:.3f}"
    return percent(value)


def points(metric: str, value: float | None, sign: bool = True) -> str:
    """A difference or a spread: in percentage points with one decimal, of a correlation with three."""
    if value is None or not math.isfinite(value):
        return "–"
    plus = "+" if sign else ""
    return f"{value:{plus}.3f}" if correlation(metric) else f"{100 * value:{plus}.1f}"


def with_spread(metric: str, mean: float | None, std: float | None) -> str:
    """``71.9 ± 1.2 %``: a mean over seeds with the standard deviation over them, where there is one."""
    if mean is None or std is None or not (math.isfinite(mean) and math.isfinite(std)):
        return shown(metric, mean)
    unit = "" if correlation(metric) else " %"
    return f"{points(metric, mean, sign=False)} ± {points(metric, std, sign=False)}{unit}"


def interval(d: Difference) -> str:
    """``-0.4 to +2.8``; a dash where no interval can be had."""
    if not has_interval(d):
        return "–"
    return f"{points(d['metric'], d['low'])} to {points(d['metric'], d['high'])}"


def has_interval(d: Difference) -> bool:
    return all(d.get(end) is not None and math.isfinite(d[end]) for end in ("low", "high"))


def outside_zero(d: Difference) -> bool:
    """Whether there is an interval and 0 lies outside it."""
    return has_interval(d) and (d["low"] > 0 or d["high"] < 0)


def finding(d: Difference, first: str, second: str) -> str:
    """What the difference of ``first`` minus ``second`` shows, in a sentence."""
    unit = "" if correlation(d["metric"]) else " points"
    what = f"{metric_name(d['metric'])}: {points(d['metric'], d['mean'])}{unit}"
    if not has_interval(d):
        return f"{what}, without an interval: what is chance in it cannot be said."
    what += f" (95 % interval {interval(d)})"
    if not outside_zero(d):
        return f"{what}: the interval holds 0, so no difference between {first} and {second} is shown."
    better = first if d["mean"] > 0 else second
    return f"{what}: the interval excludes 0, {better} is ahead."


def by_chance(differences: Sequence[Difference]) -> str | None:
    """How many of these intervals exclude 0, and how many would if nothing differed; None with none to count."""
    among = [d for d in differences if has_interval(d)]
    if not among:
        return None
    outside = sum(map(outside_zero, among))
    text = f"Of {len(among)} interval{'s' * (len(among) != 1)} {outside} exclude{'s' * (outside == 1)} 0"
    return f"{text}; were there no differences at all, about {len(among) / 20:.1f} would, each being one of 95 %."

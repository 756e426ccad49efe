"""The evaluation's numbers, each beside what knowing nothing would give; shared by page and terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RECALLS = (1, 5, 10)
#: Key of a ranking in the retrieval metrics -> its name in the tables.
RANKINGS = {
    "itc": "ITC similarity",
    "itm": "re-ranked by ITM",
    "itc_satisfied": "ITC, any that fits",
    "itm_satisfied": "ITM, any that fits",
    "chance": "chance",
}
DIRECTIONS = {"t2i": "caption → picture", "i2t": "picture → caption"}
COUNTS = {"n_images": "pictures", "n_captions": "captions"}


@dataclass(frozen=True)
class Measure:
    """One number of a result: a fraction in 0..1, the same number without skill, and what that is."""

    name: str
    value: float
    baseline: float | None
    baseline_name: str
    of: str = ""  # how many of what it was measured on


def retrieval_rows(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """(what ranks, {"t2i_r1": ..., ...}) of every ranking that was measured, chance last."""
    for key, name in RANKINGS.items():
        if metrics.get(key):
            yield name, {f"{d}_r{k}": metrics[key].get(f"{d}_r{k}") for d in DIRECTIONS for k in RECALLS}


def other_measures(results: dict[str, dict[str, Any]]) -> list[Measure]:
    """Everything but retrieval, in the order of the tables."""
    makers = {"match": _match, "grounding": _grounding, "keywords": _keywords, "words": _words}
    return [measure for task, make in makers.items() for measure in make(results.get(task, {}))]


def headline(results: dict[str, dict[str, Any]]) -> list[Measure]:
    """The four to six numbers that say what the run has learned."""
    found = []
    retrieval = results.get("retrieval", {})
    # Re-ranking is how methods that have ITM retrieve; the others rank by similarity alone.
    ranking = "itm" if retrieval.get("itm") else "itc"
    for direction, words in DIRECTIONS.items():
        value = retrieval.get(ranking, {}).get(f"{direction}_r10")
        if value is not None:
            chance = retrieval.get("chance", {}).get(f"{direction}_r10")
            found.append(Measure(f"R@10 {words}", value, chance, "chance", f"{RANKINGS[ranking]}, {size(retrieval)}"))
    wanted = ("Match AUC, random pairs", "Pointing accuracy", "Unsaid words, average precision", "Masked colour words")
    return found + [m for m in other_measures(results) if m.name in wanted]


def size(metrics: dict[str, Any]) -> str:
    """On how many pictures and captions something was measured."""
    return ", ".join(f"{metrics[k]:,} {name}" for k, name in COUNTS.items() if metrics.get(k) is not None)


def _match(m: dict[str, Any]) -> Iterator[Measure]:
    for key, name in (("auc_random", "random"), ("auc_hard", "hard")):
        if m.get(key) is not None:
            yield Measure(f"Match AUC, {name} pairs", m[key], 0.5, "chance", _of(m, "true pairs"))


def _grounding(m: dict[str, Any]) -> Iterator[Measure]:
    if m.get("pointing") is None:
        return
    names = {"random_object": "a random object", "center": "the centre", "chance": "a random patch"}
    there = {key: m[key] for key in names if m.get(key) is not None}
    best = max(there, key=lambda key: there[key], default="")
    of = [_of(m, "phrases"), *(f"{names[key]} {percent(value)}" for key, value in there.items() if key != best)]
    yield Measure("Pointing accuracy", m["pointing"], there.get(best), names.get(best, ""), ", ".join(filter(None, of)))


def _keywords(m: dict[str, Any]) -> Iterator[Measure]:
    of = _of(m, "pictures")
    if m.get("ap") is not None:
        yield Measure("Unsaid words, average precision", m["ap"], m.get("baseline_ap"), "word frequency", of)
    for key, name in (
        ("precision", "Recommended words, precision"),
        ("recall", "Recommended words, recall"),
        ("selected_precision", "Keywords of the caption that are visible"),
    ):
        if m.get(key) is not None:
            yield Measure(name, m[key], None, "", of)


def _words(m: dict[str, Any]) -> Iterator[Measure]:
    if m.get("color_right") is not None:
        yield Measure("Masked colour words", m["color_right"], m.get("color_wrong"), "another picture", _of(m, "words"))
    for key, name in (("mlm_accuracy", "Masked words"), ("mim_accuracy", "Masked patches' codes")):
        if m.get(key) is not None:
            yield Measure(name, m[key], None, "", "")


def _of(metrics: dict[str, Any], things: str) -> str:
    return f"{metrics['n']:,} {things}" if metrics.get("n") is not None else ""


def percent(value: float | None) -> str:
    """A fraction in per cent, one decimal; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %"

"""The evaluation's numbers, each beside what knowing nothing would give; shared by page and terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


#: [low, high], 95 % of the resamples of a bootstrap.
Interval = Sequence[float]


@dataclass(frozen=True)
class Measure:
    """One number of a result: a fraction in 0..1, or a correlation; the same number without skill, and what that is."""

    name: str
    value: float
    baseline: float | None
    baseline_name: str
    of: str = ""  # how many of what it was measured on
    interval: Interval | None = None
    correlation: bool = False

    @property
    def text(self) -> str:
        return _shown(self.value, self.correlation)

    @property
    def baseline_text(self) -> str:
        return _shown(self.baseline, self.correlation)

    @property
    def spread(self) -> str | None:
        """Half of the interval, in the unit of ``text``."""
        return half_width(self.interval, self.correlation)


def retrieval_rows(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, float | None], dict[str, Interval]]]:
    """(what ranks, {"t2i_r1": ..., ...}, their intervals) of every ranking that was measured, chance last."""
    for key, name in RANKINGS.items():
        if metrics.get(key):
            cells = {f"{d}_r{k}": metrics[key].get(f"{d}_r{k}") for d in DIRECTIONS for k in RECALLS}
            yield name, cells, metrics.get("intervals", {}).get(key, {})


def other_measures(results: dict[str, dict[str, Any]]) -> list[Measure]:
    """Everything but retrieval, in the order of the tables."""
    makers = {
        "match": _match,
        "grounding": _grounding,
        "keywords": _keywords,
        "words": _words,
        "classification": _classification,
        "ratings": _ratings,
        "vqa": _vqa,
        "statements": _statements,
    }
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
    wanted = (
        "Answers to questions",
        "Labels of statements",
        "Match AUC, random pairs",
        "Pointing accuracy",
        "Unsaid words, average precision",
        "Masked colour words",
    )
    return found + [m for m in other_measures(results) if m.name in wanted]


def size(metrics: dict[str, Any]) -> str:
    """On how many pictures and captions something was measured."""
    return ", ".join(f"{metrics[k]:,} {name}" for k, name in COUNTS.items() if metrics.get(k) is not None)


def _match(m: dict[str, Any]) -> Iterator[Measure]:
    for key, name in (("auc_random", "random"), ("auc_hard", "hard")):
        if m.get(key) is not None:
            of = _of(m, "true pairs")
            yield Measure(f"Match AUC, {name} pairs", m[key], 0.5, "chance", of, _interval(m, key))


#: Measure of grounding -> its name, its count, and what it is beside.
GROUNDING = {
    "pointing": (
        "Pointing accuracy",
        "n",
        {"random_object": "a random object", "center": "the centre", "chance": "a random patch"},
    ),
    "box_accuracy": ("Box from the map, IoU 0.5", "n", {"box_whole": "the whole picture", "box_middle": "its middle"}),
    "candidate_accuracy": (
        "Box among candidates, IoU 0.5",
        "candidate_n",
        {"candidate_random": "a random one", "candidate_largest": "the largest"},
    ),
}


def _grounding(m: dict[str, Any]) -> Iterator[Measure]:
    for key, (name, count, names) in GROUNDING.items():
        if m.get(key) is None:
            continue
        there = {k: m[k] for k in names if m.get(k) is not None}
        best = max(there, key=lambda k: there[k], default="")
        of = [f"{m[count]:,} phrases" if m.get(count) is not None else ""]
        of += [f"{names[k]} {percent(value)}" for k, value in there.items() if k != best]
        if key == "pointing" and m.get("layers"):
            of.append(f"layers {', '.join(map(str, m['layers']))}")
        measured = ", ".join(filter(None, of)), _interval(m, key)
        yield Measure(name, m[key], there.get(best), names.get(best, ""), *measured)


def _keywords(m: dict[str, Any]) -> Iterator[Measure]:
    of = _of(m, "pictures")
    if m.get("ap") is not None:
        baseline = m.get("baseline_ap")
        yield Measure("Unsaid words, average precision", m["ap"], baseline, "word frequency", of, _interval(m, "ap"))
    for key, name in (
        ("precision", "Recommended words, precision"),
        ("recall", "Recommended words, recall"),
        ("selected_precision", "Keywords of the caption that are visible"),
    ):
        if m.get(key) is not None:
            yield Measure(name, m[key], None, "", of, _interval(m, key))


def _words(m: dict[str, Any]) -> Iterator[Measure]:
    if m.get("color_right") is not None:
        measured = _of(m, "words"), _interval(m, "color_right")
        yield Measure("Masked colour words", m["color_right"], m.get("color_wrong"), "another picture", *measured)
    for key, name in (("mlm_accuracy", "Masked words"), ("mim_accuracy", "Masked patches' codes")):
        if m.get(key) is not None:
            yield Measure(name, m[key], None, "", "", _interval(m, key))


def _classification(m: dict[str, Any]) -> Iterator[Measure]:
    if m.get("accuracy") is None:
        return
    of, chance = f"{_of(m, 'pictures')}, {m.get('classes')} classes", m.get("chance")
    names = {
        "accuracy": ("Zero-shot class", m.get("majority"), "the most frequent class"),
        "class_accuracy": ("Zero-shot class, mean of the classes", chance, "chance"),
        "top5": ("Zero-shot class among the first 5", 5 * chance if chance is not None else None, "chance"),
    }
    for key, (name, baseline, what) in names.items():
        if m.get(key) is not None:
            yield Measure(name, m[key], baseline, what, of, _interval(m, key))


def _ratings(m: dict[str, Any]) -> Iterator[Measure]:
    for ranker, title in (("itc", "ITC"), ("itm", "ITM")):
        for key, kind in (("spearman", "Spearman"), ("kendall", "Kendall's tau-b")):
            if (value := m.get(ranker, {}).get(key)) is not None:
                ends = m.get("intervals", {}).get(ranker, {}).get(key)
                yield Measure(f"Human ratings, {kind}, {title}", value, 0.0, "no relation", _of(m, "pairs"), ends, True)


def _interval(metrics: dict[str, Any], key: str) -> Interval | None:
    return metrics.get("intervals", {}).get(key)


def half_width(interval: Interval | None, correlation: bool = False) -> str | None:
    """``± 2.4``, in per cent unless of a correlation; None without an interval."""
    if not interval:
        return None
    half = (interval[1] - interval[0]) / 2
    return f"± {half:.3f}" if correlation else f"± {100 * half:.1f}"


#: Metric -> what it stands for: answers given without the image.
BLIND = {
    "text_only": "the words alone",
    "majority_of_type": "the most frequent of its first words",
    "majority": "the most frequent",
}


def _vqa(m: dict[str, Any]) -> Iterator[Measure]:
    """All questions, then every type of them."""
    if m.get("accuracy") is None:
        return
    yield _beside_blind("Answers to questions", m, "questions")
    for kind, of in m.get("types", {}).items():
        yield _beside_blind(f"Answers, {kind or 'other'}", of, "questions")


def _statements(m: dict[str, Any]) -> Iterator[Measure]:
    """All statements, then the share of every label that is found."""
    if m.get("accuracy") is None:
        return
    yield _beside_blind("Labels of statements", m, "statements")
    for label, of in m.get("classes", {}).items():
        yield Measure(f"Statements of label {label} found", of["recall"], None, "", f"{of['n']:,} statements")


def _beside_blind(name: str, m: dict[str, Any], things: str) -> Measure:
    there = {key: m[key] for key in BLIND if m.get(key) is not None}
    best = max(there, key=lambda key: there[key], default="")
    of = [f"{m['n']:,} {things}", *(f"{BLIND[key]} {percent(value)}" for key, value in there.items() if key != best)]
    return Measure(name, m["accuracy"], there.get(best), BLIND.get(best, ""), ", ".join(of), _interval(m, "accuracy"))


def _of(metrics: dict[str, Any], things: str) -> str:
    return f"{metrics['n']:,} {things}" if metrics.get("n") is not None else ""


def _shown(value: float | None, correlation: bool) -> str:
    return f"{value:.3f}" if correlation and value is not None else percent(value)


def percent(value: float | None) -> str:
    """A fraction in per cent, one decimal; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %"

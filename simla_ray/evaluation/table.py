"""The results as lines for a terminal, each number beside what knowing nothing would give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simla_ray.types import EvalResult

Line = tuple[str, str, str, str]  # task, measure, value, baseline

#: Metric -> its name and what chance it is beside.
RANKERS = {
    "itc": ("ITC", "chance"),
    "itm": ("ITM re-ranked", "chance"),
    "itc_satisfied": ("ITC, all that fit", "chance_satisfied"),
    "itm_satisfied": ("ITM re-ranked, all that fit", "chance_satisfied"),
}


def table(results: Mapping[str, EvalResult]) -> str:
    """Aligned columns: task, measure, value and baseline in per cent; a head line says on how much."""
    lines = [("task", "measure", "value", "baseline")]
    for name, rows in _ROWS.items():
        if name in results:
            lines += [(name, *line) for line in rows(results[name].metrics)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    body = [
        f"{task:<{widths[0]}}  {measure:<{widths[1]}}  {value:>{widths[2]}}  {baseline}".rstrip()
        for task, measure, value, baseline in lines
    ]
    return "\n".join([*_head(results), *body])


def _head(results: Mapping[str, EvalResult]) -> Iterator[str]:
    if "data" not in results:
        return
    m = results["data"].metrics
    yield f"{m['n_images']:,} images with {m['n_captions']:,} captions, of {m['n_rows']:,} rows; values in per cent"
    if m["dropped"]:
        yield "dropped rows: " + ", ".join(f"{reason} {n}" for reason, n in m["dropped"].items())


def _retrieval(m: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key, (ranker, chance_key) in RANKERS.items():
        if key in m:
            for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
                cells = [f"{direction}_r{k}" for k in (1, 5, 10)]
                value, chance = (
                    " ".join(f"{100 * values[c]:5.1f}" for c in cells) for values in (m[key], m[chance_key])
                )
                yield f"{name} R@1 5 10, {ranker}", value, f"{chance} chance"


def _match(m: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key, name in (("auc_random", "random"), ("auc_hard", "hard")):
        if key in m:
            yield f"AUC, {name} negatives", _percent(m[key]), "50.0 chance"


def _grounding(m: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    names = {"chance": "any patch", "center": "centre", "random_object": "any object"}
    baseline = ", ".join(f"{_percent(m[key])} {name}" for key, name in names.items() if key in m)
    yield f"pointing, {m['n']:,} phrases", _percent(m["pointing"]), baseline


def _keywords(m: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield f"unsaid words, AP, {m['n']:,} images", _percent(m["ap"]), f"{_percent(m['baseline_ap'])} word frequency"
    yield "recommended words, precision", _percent(m["precision"]), ""
    yield "recommended words, recall", _percent(m["recall"]), ""
    if "selected_precision" in m:
        yield "keywords of captions that are visible", _percent(m["selected_precision"]), ""


def _words(m: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    if "color_right" in m:
        wrong = f"{_percent(m['color_wrong'])} over another image"
        yield f"masked colour words, {m['n']:,}", _percent(m["color_right"]), wrong
    for key, name in (("mlm_accuracy", "masked words"), ("mim_accuracy", "masked patches' codes")):
        if key in m:
            yield name, _percent(m[key]), ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


_ROWS = {
    "retrieval": _retrieval,
    "match": _match,
    "grounding": _grounding,
    "keywords": _keywords,
    "words": _words,
}

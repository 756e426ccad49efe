"""The results as lines for a terminal, each number with its interval and beside what knowing nothing would give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simla_ray.types import EvalResult

Line = tuple[str, str, str]  # measure, value, baseline
#: Width of a number with its interval, as a rule.
CELL = 18

#: Metric -> the name of its ranking; chance is one too, in a line of its own as it has as many numbers.
RANKERS = {
    "itc": "ITC",
    "itm": "ITM re-ranked",
    "chance": "chance",
    "itc_satisfied": "ITC, all that fit",
    "itm_satisfied": "ITM, all that fit",
    "chance_satisfied": "chance, all that fit",
}


def table(results: Mapping[str, EvalResult]) -> str:
    """Aligned columns: task, measure, value in per cent with its interval of 95 %, and baseline.

    The head says on how much was measured, the last line which tasks were not run and why.
    """
    lines = [("task", "measure", "value", "baseline")]
    for name, rows in _ROWS.items():
        if name in results:
            lines += [(name, *line) for line in rows(_Metrics(results[name]))]
    # Three numbers with their intervals, which have no baseline, may reach into its column.
    widths = [max(len(line[i]) for line in lines if i < 2 or line[3]) for i in range(3)]
    body = [
        f"{task:<{widths[0]}}  {measure:<{widths[1]}}  {value:<{widths[2]}}  {baseline}".rstrip()
        for task, measure, value, baseline in lines
    ]
    return "\n".join([*_head(results), *body, *_not_run(results)])


class _Metrics:
    """A task's metrics, and its numbers as they are shown."""

    def __init__(self, result: EvalResult):
        self.values, self.intervals = result.metrics, result.intervals

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def shown(self, *path: str, scale: int = 100) -> str:
        """``21.3 [18.9, 23.7]`` for a metric by the names that lead to it; without an interval the number alone."""
        value, ends = self.values, self.intervals
        for name in path:
            value, ends = value[name], ends.get(name, {})
        digits = 1 if scale == 100 else 3
        text = f"{scale * value:5.{digits}f}"
        return f"{text} [{', '.join(f'{scale * end:.{digits}f}' for end in ends)}]" if ends else text


def _head(results: Mapping[str, EvalResult]) -> Iterator[str]:
    if "data" not in results:
        return
    m = results["data"].metrics
    yield f"{m['n_images']:,} images with {m['n_captions']:,} captions, of {m['n_rows']:,} rows; values in per cent"
    if m["dropped"]:
        yield f"dropped rows: {_counted(m['dropped'])}"


def _not_run(results: Mapping[str, EvalResult]) -> Iterator[str]:
    missing = results["data"].metrics.get("not_run") if "data" in results else None
    if missing:
        yield "not run: " + ", ".join(f"{task} ({why})" for task, why in missing.items())


def _retrieval(m: _Metrics) -> Iterator[Line]:
    for key, ranker in RANKERS.items():
        if key in m:
            for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
                cells = [m.shown(key, f"{direction}_r{k}") for k in (1, 5, 10)]
                width = CELL if key in m.intervals else 0
                yield f"{name} R@1 5 10, {ranker}", "  ".join(cell.ljust(width) for cell in cells), ""


def _match(m: _Metrics) -> Iterator[Line]:
    for key, name in (("auc_random", "random"), ("auc_hard", "hard")):
        if key in m:
            yield f"AUC, {name} negatives", m.shown(key), "50.0 chance"


def _grounding(m: _Metrics) -> Iterator[Line]:
    layers = f", layers {', '.join(map(str, m['layers']))}" if "layers" in m else ""
    candidates = f"box of candidates, {m['candidate_n']:,} phrases" if "candidate_n" in m else ""
    for key, name, baselines in (
        ("pointing", f"pointing, {m['n']:,} phrases{layers}",
         {"chance": "any patch", "center": "centre", "random_object": "any object"}),
        ("box_accuracy", "box from the map, IoU 0.5", {"box_whole": "whole image", "box_middle": "middle"}),
        ("candidate_accuracy", candidates, {"candidate_random": "any", "candidate_largest": "largest"}),
    ):  # fmt: skip
        if key in m:
            beside = [f"{_percent(m[other])} {what}" for other, what in baselines.items() if other in m]
            yield name, m.shown(key), ", ".join(beside)
    if skipped := m.values.get("skipped"):
        yield "phrases and boxes not used", "", _counted(skipped)


def _keywords(m: _Metrics) -> Iterator[Line]:
    baseline = f"{_percent(m['baseline_ap'])} word frequency"
    yield f"unsaid words, AP, {m['n']:,} images", m.shown("ap"), baseline
    yield "recommended words, precision", m.shown("precision"), ""
    yield "recommended words, recall", m.shown("recall"), ""
    if "selected_precision" in m:
        yield "keywords of captions that are visible", m.shown("selected_precision"), ""


def _words(m: _Metrics) -> Iterator[Line]:
    if "color_right" in m:
        wrong = f"{_percent(m['color_wrong'])} over another image"
        yield f"masked colour words, {m['n']:,}", m.shown("color_right"), wrong
    for key, name in (("mlm_accuracy", "masked words"), ("mim_accuracy", "masked patches' codes")):
        if key in m:
            yield name, m.shown(key), ""


def _classification(m: _Metrics) -> Iterator[Line]:
    chance = f"{_percent(m['chance'])} chance"
    baseline = f"{chance}, {_percent(m['majority'])} majority"
    yield f"{m['classes']:,} classes, {m['n']:,} images", m.shown("accuracy"), baseline
    yield "mean of the classes", m.shown("class_accuracy"), chance
    if "top5" in m:
        yield "true class among the first 5", m.shown("top5"), f"{_percent(5 * m['chance'])} chance"


def _ratings(m: _Metrics) -> Iterator[Line]:
    for key, name in (("itc", "ITC"), ("itm", "ITM")):
        if key in m:
            value = "  ".join(m.shown(key, kind, scale=1) for kind in ("spearman", "kendall"))
            yield f"Spearman, Kendall of {name}, {m['n']:,} pairs", value, ""
    if m["dropped"]:
        yield "dropped ratings", _counted(m["dropped"]), ""


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in reasons.items())


def _vqa(m: _Metrics) -> Iterator[Line]:
    yield f"answers, {m['n']:,} questions", m.shown("accuracy"), _without_looking(m)
    for kind, of in m["types"].items() if "types" in m else ():
        yield f"  {kind or 'other'}, {of['n']:,}", _percent(of["accuracy"]), _without_looking(of)


def _statements(m: _Metrics) -> Iterator[Line]:
    baseline = filter(None, [f"{_percent(m['chance'])} chance", _without_looking(m)])
    yield f"labels, {m['n']:,} statements", m.shown("accuracy"), ", ".join(baseline)


#: What is reached without looking, and how it is called.
BLIND = {"majority": "majority", "majority_of_type": "majority by first words", "text_only": "text only"}


def _without_looking(m: Any) -> str:
    return ", ".join(f"{_percent(m[key])} {name}" for key, name in BLIND.items() if key in m)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


_ROWS = {
    "retrieval": _retrieval,
    "match": _match,
    "grounding": _grounding,
    "keywords": _keywords,
    "words": _words,
    "vqa": _vqa,
    "statements": _statements,
    "classification": _classification,
    "ratings": _ratings,
}

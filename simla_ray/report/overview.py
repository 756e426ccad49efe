"""The head of a report, its results, and its curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simla_ray.markup import Markup, join, table, tag
from simla_ray.report import figures
from simla_ray.report.figures import Frame
from simla_ray.report.folder import RunFolder
from simla_ray.report.reference import band_of, beside_reference, find_reference
from simla_ray.report.results import (
    DIRECTIONS,
    RECALLS,
    Measure,
    half_width,
    headline,
    other_measures,
    percent,
    retrieval_rows,
    size,
)

OBJECTIVES = {
    "itc": "Image-text contrast",
    "itm": "Image-text matching",
    "mlm": "Masked language",
    "mim": "Masked image",
    "psl": "Keywords (pseudo-supervised)",
    "wpa": "Words to patches or regions (optimal transport)",
    "mrfr": "Features of hidden regions",
    "mrc": "Classes of hidden regions",
    "mrckl": "Classes of hidden regions (soft)",
    "mcr": "Masked tags",
    "wpg": "Phrases to regions",
    "answers": "Answers to questions",
    "labels": "Labels of statements",
}
METHODS = {"simla": "SIMLA", "albef": "ALBEF", "clip": "CLIP", "siglip": "SigLIP", "vilt": "ViLT", "uniter": "UNITER"}
METHODS |= {"mvptr": "MVPTR"}
#: More phase numbers than this are not explained in words.
MANY = 4


def sentence(run: RunFolder) -> str:
    """What was trained on what and for how long."""
    config, done = run.run, run.summary or {}
    names = [name.upper() if config.task is None else name for name in config.objectives.active()]
    what = f"{METHODS.get(config.method, str(config.method))} at size {config.size}"
    if config.task is not None:
        what += f", fine-tuned for {config.task},"
    if str(config.variant) != "default":
        what += f", {config.variant} variant,"
    given = config.vision.pretrained or config.vision.weights is not None or config.text.weights is not None
    start = "from pretrained towers" if given else "from scratch"
    if config.init_from is not None:
        start = f"from the weights of {config.init_from}"
    rows = run.manifest.get("data", {}).get("train", {}).get("rows")
    source = ", ".join(config.data.train) + (f" ({rows:,} rows)" if rows else "")
    steps = done.get("steps") or run.step
    pairs = done.get("samples_seen") or steps * config.batch.global_
    epochs = done.get("epochs") or _last(run, "epochs")
    seconds = done.get("seconds") or _last(run, "seconds")
    workers = done.get("world_size") or run.manifest.get("world_size") or config.ray.workers
    text = f"{what} with {_list(names)}, trained {start} on {source}: {steps:,} steps of {config.batch.global_:,} pairs"
    text += f", {pairs:,} pairs" + (f" or {epochs:.1f} epochs" if epochs else "")
    text += f", in {duration(seconds)}" if seconds else ""
    text += f" on {workers} worker{'' if workers == 1 else 's'}"
    rate = done.get("pairs_per_s") or (pairs / seconds if seconds else None)
    text += f" ({rate:,.0f} pairs per second)." if rate else "."
    best = done.get("best_step")
    if best is not None:
        text += f" Evaluated is the checkpoint of step {best:,}"
        text += ", the last one." if best == done.get("steps") else f", the best by {config.eval.best}."
    return text


def duration(seconds: float) -> str:
    """A time in words, two units at most."""
    units = (("day", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for name, length in units:
        if left >= length or (name == "s" and not parts):
            count, left = divmod(left, length)
            parts.append(f"{count} {name}{'s' if name == 'day' and count != 1 else ''}")
        elif parts:
            break
    return " ".join(parts[:2])


def notes(run: RunFolder) -> Markup | None:
    """What a reader must know before the numbers: an unfinished run, departures from the published method."""
    found = []
    if run.summary is None:
        total = run.total_steps
        text = f"This run has not ended: the page shows what it had written by step {run.step:,} of {total:,}."
        found.append(tag("p", tag("strong", "Unfinished. "), text, class_="warning"))
    fallbacks = run.manifest.get("fallbacks") or []
    if fallbacks:
        lines = tag("ul", *(tag("li", line) for line in fallbacks))
        title = tag("strong", "Not the method as published:")
        found.append(tag("div", title, lines, class_="departures"))
    return join(found) if found else None


def tiles(run: RunFolder) -> Markup | None:
    """The headline numbers, each on a bar from 0 to 100 % with a tick at its baseline."""
    measures = headline(run.results)
    if not measures:
        return None
    text = "The tick on a bar is the baseline below it."
    recall = next((m.of for m in measures if m.name.startswith("R@10")), None)
    note = tag("p", text if recall is None else f"{text} R@10: {recall}.", class_="note")
    return join([tag("div", *map(_tile, measures), class_="tiles"), note])


def _tile(measure: Measure) -> Markup:
    bar = [tag("i", class_="value", style=f"width:{100 * _unit(measure.value):.1f}%")]
    below: str = measure.of
    if measure.baseline is not None:
        bar.append(tag("i", class_="tick", style=f"left:{100 * _unit(measure.baseline):.1f}%"))
        below = join([measure.baseline_name, " ", tag("span", percent(measure.baseline), class_="together")])
    return tag(
        "div",
        tag("span", measure.name, class_="name"),
        tag("span", percent(measure.value), class_="big"),
        tag("span", *bar, class_="bar", aria_hidden="true"),
        tag("span", below, class_="below"),
        class_="tile",
        title=measure.of or None,
    )


def result_section(run: RunFolder) -> tuple[str, str, Markup] | None:
    """All results beside their baselines."""
    parts: list[Markup] = []
    retrieval = run.results.get("retrieval")
    if retrieval:
        head = ["ranking", *(f"{words}, R@{k}" for words in DIRECTIONS.values() for k in RECALLS)]
        rows = [
            [name, *(_with_spread(percent(cell), half_width(ends.get(key))) for key, cell in cells.items())]
            for name, cells, ends in retrieval_rows(retrieval)
        ]
        title = f"Retrieval: {run.label}, {size(retrieval)}"
        parts.append(table(head, rows, title, range(1, len(head)), "retrieval"))
        if any(key.endswith("_satisfied") for key in retrieval):
            text = "Any that fits: right is every picture of which the caption is true, not only the caption's own."
            parts.append(tag("p", text, class_="note"))
    measures = other_measures(run.results)
    if measures:
        rows = [(m.name, _with_spread(m.text, m.spread), m.baseline_text, m.baseline_name, m.of) for m in measures]
        head = ("measure", "result", "baseline", "baseline is", "measured on")
        parts.append(table(head, rows, f"Other tasks: {run.label}", (1, 2)))
    if any(result.get("intervals") for result in run.results.values()):
        text = "± is half of the interval that holds 95 % of 1,000 resamples of the pictures, with all their captions."
        parts.append(tag("p", text, class_="note"))
    parts += _confused(run.results.get("classification", {}))
    missing = run.results.get("data", {}).get("not_run")
    if missing:
        text = ", ".join(f"{task} ({why})" for task, why in missing.items())
        parts.append(tag("p", f"Not run: {text}.", class_="note"))
    dropped = run.results.get("data", {}).get("dropped")
    if dropped:
        text = ", ".join(f"{reason} {n:,}" for reason, n in dropped.items())
        parts.append(tag("p", f"Rows of the evaluation that could not be used: {text}.", class_="note"))
    return ("results", "Results", join(parts)) if parts else None


def _with_spread(text: str, spread: str | None) -> Markup | str:
    return text if spread is None else join([text, " ", tag("small", spread)])


def _confused(classification: dict[str, Any]) -> list[Markup]:
    """The classes that are most often taken for each other."""
    rows = [(pair["label"], pair["predicted"], f"{pair['n']:,}") for pair in classification.get("confused", [])]
    return [table(("class", "taken for", "pictures"), rows, "Classes most often confused", (2,))] if rows else []


def curve_section(run: RunFolder) -> tuple[str, str, Markup] | None:
    """Losses, validation, learning rate and speed over the steps."""
    if not run.train:
        return None
    frame = Frame(run.total_steps, run.phase_steps, run.restart_steps)
    reference = find_reference(run)
    cards = []
    for name in run.run.objectives.active():
        train = run.loss(name)
        if train:
            band = None if reference is None else band_of(reference, name)
            uri = figures.loss_curve(frame, name, train, run.validation(f"{name}_hard"), band)
            title = f"{OBJECTIVES.get(name, name)}, {name}"
            cards.append(_card(uri, title, f"{title}: training loss from {train[0][1]:.3g} to {train[-1][1]:.3g}"))
    recall = run.validation("retrieval_r10")
    if recall:
        band = None if reference is None else band_of(reference, "retrieval_r10")
        uri = figures.retrieval_curve(frame, recall, _recall_chance(run), band)
        cards.append(_card(uri, "Validation retrieval, R@10", f"Validation R@10, last {percent(recall[-1][1])}"))
    curves = {n: points for n in run.run.objectives.active() if (points := run.validation(f"{n}_accuracy"))}
    if curves:
        last = ", ".join(f"{name} {percent(points[-1][1])}" for name, points in curves.items())
        cards.append(_card(figures.accuracy_curves(frame, curves), "Validation accuracy", f"Last values: {last}"))
    rate = [(line["step"], line["lr"]) for line in run.train if line.get("lr") is not None]
    if rate:
        peak = max(value for _, value in rate)
        cards.append(_card(figures.rate_curve(frame, rate), "Learning rate", f"Learning rate, peak {peak:.3g}"))
    speed, wait = run.at_log_points("pairs_per_s"), run.at_log_points("data_wait_fraction")
    if speed:
        alt = f"Pairs per second, last {speed[-1][1]:.0f}, and share of the time spent waiting for data"
        cards.append(_card(figures.speed_curve(frame, speed, wait), "Speed and data wait", alt))
    beside = None if reference is None else tag("p", beside_reference(run, reference), class_="lead")
    lead = tag("p", _legend(run), class_="lead")
    return "curves", "Curves", join([lead, beside, tag("div", *cards, class_="figures")])


def _legend(run: RunFolder) -> str:
    text = (
        "Faint: every step; bold: smoothed. Dashed with dots: validation, on fixed pictures, words and masks against "
        "the true targets only, so its level differs from a training loss that also holds the teacher's soft targets."
    )
    phases = run.run.schedule.phases
    if 1 < len(phases) <= MANY:
        on = run.run.objectives.active()
        said = [f"phase {i}: {', '.join(n for n in on if n in p.objectives)}" for i, p in enumerate(phases, 1)]
        text += f" Dotted lines: changes of phase ({'; '.join(said)})."
    if run.restart_steps:
        text += " Upright dashed lines: restarts."
    return text


def _card(uri: str, title: str, alt: str) -> Markup:
    return tag("figure", tag("figcaption", title), tag("img", src=uri, alt=alt))


def _recall_chance(run: RunFolder) -> float | None:
    rows = run.manifest.get("data", {}).get("val", {}).get("rows")
    return min(1.0, 10 / min(rows, run.run.eval.pairs)) if rows else None


def _last(run: RunFolder, key: str) -> float | None:
    points = run.at_log_points(key)
    return points[-1][1] if points else None


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value)) if value == value else 0.0


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

"""The sections of a sweep's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simla_ray.markup import Markup, join, table, tag
from simla_ray.markup.document import Section
from simla_ray.report.study import sweep_figures as figures
from simla_ray.report.study.folder import Study, card, yaml_value
from simla_ray.report.study.metrics import (
    by_chance,
    column_name,
    finding,
    interval,
    metric_name,
    points,
    shown,
    with_spread,
)
from simla_ray.report.study.trials import Trials
from simla_ray.report.terminal import clock

#: Finished trials below this many say little about importance.
FEW = 20
#: Trials of a front whose parameters stand side by side.
MANY_COLUMNS = 6


def chosen_section(study: Study, trials: Trials) -> Section | None:
    """The parameters of the best trial, or of those on the front, beside the base's."""
    picked = [trials.by_name[name] for name in trials.best if name in trials.by_name][:MANY_COLUMNS]
    if not picked:
        return None
    base = trials.default
    rows: list[list[Any]] = []
    for path in study.space:
        own = base["params"].get(path, study.base(path)) if base is not None else study.base(path)
        rows.append([tag("code", path), _value(own), *(_param(trial, path) for trial in picked)])
    for i, objective in enumerate(trials.objectives):
        base_value = trials.value(base, i) if base is not None else None
        values = (shown(objective["metric"], v) for v in (base_value, *(trials.value(trial, i) for trial in picked)))
        rows.append([tag("strong", objective["name"]), *values])
    if trials.base_so_far:
        rows.append(["steps of the trial", f"{base['steps']:,}" if base else "–", *(f"{t['steps']:,}" for t in picked)])
    head = ["key", "base config", *(study.link(f"trials/{trial['name']}", trial["name"]) for trial in picked)]
    title = "Parameters of the Pareto front" if trials.pareto else "Parameters of the best trial"
    parts = [table(head, rows, title, range(1, len(head)))]
    if trials.pareto:
        left = len(trials.best) - len(picked)
        if left > 0:
            parts.append(tag("p", f"And {left} more on the front, in the table of all trials.", class_="note"))
    elif picked[0].get("default"):
        parts.append(tag("p", "The best trial is the base config itself: the search found nothing better."))
    else:
        note = "best.yaml holds this config: pretrain.py --config best.yaml trains it. “unused”: a key whose condition "
        parts.append(tag("p", note + "does not hold.", class_="note"))
    return "best", "Best beside the base", join(parts)


def repeats_section(study: Study, trials: Trials) -> Section | None:
    """The best trial and the base config, trained again with fresh seeds and measured on the test set."""
    repeats = study.summary.get("repeats")
    if not repeats:
        return None
    seeds = repeats["seeds"]
    parts: list[Any] = [
        tag("p", _what_repeats_are(trials, repeats, study.summary.get("trunk_steps") or 0), class_="lead")
    ]
    for which, title in (("best", "best trial"), ("default", "base config")):
        missing = sorted(set(seeds) - {run["seed"] for run in repeats[which]})
        if missing:
            others = ": the means are over the others" if repeats[which] else ""
            text = f"No result of the {title} with seed {', '.join(map(str, missing))}{others}."
            parts.append(tag("p", text, class_="warning"))
    for run in repeats.get("failed") or []:
        parts.append(tag("p", f"{run['name']}: {run['reason']}", class_="note"))
    differences = repeats.get("differences") or []
    if differences:
        head = ("metric, test set", "best trial", "base config", "difference, points", "95 % interval", "of each seed")
        rows = [
            (
                metric_name(d["metric"]),
                with_spread(d["metric"], d["a"], d.get("std_a")),
                with_spread(d["metric"], d["b"], d.get("std_b")),
                points(d["metric"], d["mean"]),
                interval(d),
                ", ".join(points(d["metric"], one) for one in d.get("per_seed") or []) or "–",
            )
            for d in differences
        ]
        title = f"Trained again with seeds {', '.join(map(str, seeds))}: mean ± standard deviation over seeds"
        parts.append(table(head, rows, title, range(1, 6)))
        said = [finding(d, "the best trial", "the base config") for d in differences]
        parts.append(tag("ul", *(tag("li", text) for text in said)))
        parts.append(tag("p", by_chance(differences), class_="note"))
    parts.append(_runs(study, repeats))
    return "repeats", "Is it better than the base?", join(parts)


def _what_repeats_are(trials: Trials, repeats: Mapping[str, Any], trunk_steps: int) -> str:
    seeds, rival = repeats["seeds"], repeats.get("trial")
    chosen = " and ".join(objective["name"] for objective in trials.objectives)
    count = f"{len(trials.finished)} finished trial{'s' * (len(trials.finished) != 1)}"
    text = f"The best of {count} was chosen by {chosen} on the validation set, so its value there is flattered by "
    text += f"the choice. Here both configs were trained again with {len(seeds)} seed{'s' * (len(seeds) != 1)} that "
    text += "the search did not use, and measured on the test set, which chose nothing."
    if rival and trials.best and rival not in trials.best:
        text += (
            f" The base itself came out best, so it is {rival}, the best of the other trials, that stands beside it."
        )
    if trunk_steps:
        text += (
            f" Trials went on from {trunk_steps:,} steps of the base; here both configs are trained from the first "
            "step, which is another experiment than the one that chose."
        )
    return text


def _runs(study: Study, repeats: Mapping[str, Any]) -> Markup:
    """Every repeat with its own numbers: where the means come from."""
    runs = [(which, run) for which in ("best", "default") for run in repeats[which]]
    metrics = list(dict.fromkeys(metric for _, run in runs for metric in run["metrics"]))
    head = ["run", "seed", *map(column_name, metrics)]
    rows = [
        [study.link(f"repeats/{run['name']}", run["name"]), str(run["seed"]),
         *(shown(metric, run["metrics"].get(metric)) for metric in metrics)]
        for _, run in runs
    ]  # fmt: skip
    return table(head, rows, "Run by run", range(1, len(head)))


def curves_section(study: Study, trials: Trials) -> Section | None:
    """Learning curves of all trials, one figure for each objective that validations measure."""
    cards = []
    wanted = dict.fromkeys([objective["metric"] for objective in trials.objectives] + ["retrieval_r10"])
    for metric in wanted:
        curves = []
        for trial in trials.every:
            found = study.validation(f"trials/{trial['name']}", metric)
            if found:
                curves.append(figures.Curve(trial["name"], trials.kind(trial), found))
        if curves:
            uri = figures.learning_curves(curves, study.summary.get("rungs") or [], metric)
            title = f"{metric_name(metric)}, {len(curves)} trials"
            top = max((curve.points[-1][1], curve.name) for curve in curves)
            alt = f"{title} over the steps; the highest last value is {shown(metric, top[0])}, of {top[1]}"
            cards.append(card(uri, title, alt, whole=True))
        if cards and not trials.pareto:
            break
    if not cards:
        return None
    text = "A cross ends the curve of a trial that did not reach its last step. "
    if study.summary.get("rungs"):
        text += "Dotted lines: rungs, where those that lag behind are stopped."
    return "curves", "Learning curves", join([tag("p", text, class_="lead"), tag("div", *cards, class_="figures wide")])


def parameters_section(study: Study, trials: Trials) -> Section | None:
    """Which parameters matter, and where the good trials lie; the front, with two objectives."""
    first = trials.objectives[0]
    values = {trial["name"]: v for trial in trials.every if (v := trials.value(trial)) is not None}
    parts: list[Any] = []
    if trials.pareto and trials.points:
        uri = figures.pareto_front(
            trials.points,
            trials.best,
            trials.default["name"] if trials.default is not None else None,
            [objective["metric"] for objective in trials.objectives],
            [objective["name"] for objective in trials.objectives],
        )
        title = f"{trials.objectives[0]['name']} against {trials.objectives[1]['name']}"
        parts.append(card(uri, title, f"{title}; on the front: {', '.join(trials.best)}"))
    importance = study.summary.get("importance")
    if importance:
        order = sorted(importance.items(), key=lambda item: -item[1])
        alt = "Importance: " + ", ".join(f"{path} {100 * share:.0f} %" for path, share in order)
        parts.append(card(figures.importance_bars(importance), f"Importance for {first['name']}", alt))
    drawn = [trial for trial in trials.every if trial["params"]]
    if study.space and drawn:
        uri = figures.parallel_coordinates(study.space, drawn, values, trials.best, first["metric"])
        alt = f"Parameters of {len(drawn)} trials as lines, coloured by {first['name']}; best: {', '.join(trials.best)}"
        parts.append(card(uri, f"Parameters of every trial, coloured by {first['name']}", alt, whole=True))
    if not parts:
        return None
    lead = [tag("p", _how_sure(importance, len(trials.finished)), class_="lead")]
    return "parameters", "Parameters", join([*lead, tag("div", *parts, class_="figures wide")])


def _how_sure(importance: Mapping[str, float] | None, finished: int) -> str:
    text = (
        "Dark lines: low values, light ones: high; the best bold in orange, dashed grey without a value. “unused”: a "
    )
    text += "parameter whose condition does not hold. "
    if importance is None:
        return text + f"Importance cannot be told from {finished} finished trial{'s' * (finished != 1)}."
    text += "Importance is each parameter's share in what sets the best tenth of the finished trials apart from all "
    text += f"(PED-ANOVA), from {finished} finished trial{'s' * (finished != 1)}"
    return text + (": so few that a share is a hint at best." if finished < FEW else ".")


def trials_section(study: Study, trials: Trials) -> Section | None:
    """Every trial once."""
    if not trials.every:
        return None
    space = list(study.space)
    head: list[Any] = ["trial", *(objective["name"] for objective in trials.objectives), "status", "steps", "time"]
    numbers = [*range(1, len(trials.objectives) + 1), len(trials.objectives) + 2, len(trials.objectives) + 3]
    head += ["why", *(tag("code", figures.short(path)) for path in space)]
    rows = []
    for trial in trials.every:
        name: Any = study.link(f"trials/{trial['name']}", trial["name"])
        if trial["name"] in trials.best:
            name = tag("strong", name)
        if trial.get("default"):
            name = join([name, " ", tag("small", "base config")])
        values = [shown(o["metric"], trials.value(trial, i)) for i, o in enumerate(trials.objectives)]
        seconds = trial.get("seconds")
        took = clock(seconds) if seconds is not None else "–"
        facts = [trials.status(trial), f"{trial.get('steps') or 0:,}", took]
        why = tag("span", trial.get("reason") or "–", class_="why")
        rows.append([name, *values, *facts, why, *(_param(trial, path) for path in space)])
    title = "All trials; the value of one that was stopped is that of its last validation"
    return "trials", "Trials", table(head, rows, title, numbers, "dense")


def space_section(study: Study) -> Section | None:
    """What could be drawn, and the config."""
    parts = []
    if study.space:
        rows = []
        for path, entry in study.space.items():
            kind = next(kind for kind in ("uniform", "log", "int", "choice") if kind in entry)
            drawn = ", ".join(map(yaml_value, entry[kind])) if kind == "choice" else " to ".join(
                yaml_value(end) for end in entry[kind])  # fmt: skip
            rows.append((tag("code", path), kind, drawn, _condition(entry.get("when")), _value(study.base(path))))
        parts.append(table(("key", "drawn", "from", "only when", "base config"), rows, "Search space"))
    if study.config_text:
        text = tag("pre", study.config_text, tabindex="0")
        parts.append(tag("details", tag("summary", "The whole sweep.yaml"), text))
    return ("configuration", "Space and configuration", join(parts)) if parts else None


def _condition(when: Mapping[str, Any] | None) -> Any:
    if not when:
        return "–"
    texts = []
    for path, wanted in when.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        texts.append(f"{path}: {' or '.join(map(yaml_value, allowed))}")
    return tag("code", ", ".join(texts))


def _param(trial: Mapping[str, Any], path: str) -> str:
    return yaml_value(trial["params"][path]) if path in trial["params"] else "unused" if trial["params"] else "–"


def _value(value: Any) -> str:
    return "–" if value is None else yaml_value(value)

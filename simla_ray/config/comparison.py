"""A comparison file: an ordinary run config, shared by all entries, and a section ``comparison`` -> one checked plan.

Layers of an entry, later ones win: size preset, the entry's method preset, recipe and variant, shared keys, the entry's
own. So shared keys may not touch what makes an entry: keys over an objective that a method has not would switch it on.
They may lie over a recipe.

Controlled, entries differ in fusion and objectives alone (``config.controlled``), and so do their recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from simla_ray.config.controlled import FOR_ALL, NOTE, is_held, is_over_boxes, unheld
from simla_ray.config.enums import ALIASES, FORMS, Method, Variant
from simla_ray.config.load import (
    did_you_mean,
    explain,
    layers,
    leaves,
    merge,
    nest,
    over_presets,
    preset,
    recipe_names,
    to_dict,
    validated,
)
from simla_ray.config.schema import Data, Run, Section, identity, operational
from simla_ray.errors import UserError

#: What a run has where neither size nor keys say anything.
AUGMENT = Data.model_fields["augment"].default
#: Compared where nothing is chosen, beside the entries that the files define themselves.
STANDARD = ("clip", "albef", "simla", "simla-no-psl")
_DIFFER = "is what entries differ in; set it in comparison.entries.<name>"
_SWITCH = "belongs to the entries: over a method that does without, it would switch it on; set it there"
#: What shared keys cannot be, by how their paths begin.
NOT_SHARED = {
    "method": _DIFFER,
    "variant": _DIFFER,
    "objectives": _SWITCH,
    "teacher": _SWITCH,
    "queue": _SWITCH,
    "temperature": _SWITCH,
    "schedule": _SWITCH,
    "task": "pretrainings are compared",
    "seed": "see comparison.seeds",
    "data.fraction": "see comparison.fractions",
}
_HELD = "is held equal by comparison.controlled; set it beside the comparison, or leave it to the methods"
_SAME = "is the same for all entries; set it beside the comparison"
#: What an entry's keys cannot be.
NOT_OWN = {
    **dict.fromkeys(("name", "storage", "world", "data.val", "data.val_split", "data.test", "data.test_split"), _SAME),
    **dict.fromkeys(("optim.max_steps", "optim.epochs", "batch.global"), _SAME),
    "task": "pretrainings are compared",
    "seed": "see comparison.seeds",
    "data.fraction": "see comparison.fractions",
}


class Comparison(Section):
    entries: dict[str, dict[str, Any]] = identity(
        {}, "{name: {method, variant, description and any keys of a run}}, beside the built-in ones; null removes one"
    )
    chosen: list[str] | None = operational(
        None, "entries that are compared; null: clip, albef, simla, simla-no-psl and those the file defines"
    )
    controlled: bool = identity(
        False, "nothing but fusion and objectives differs: same data, towers, steps, batch, optimiser; no own recipes"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = operational([0, 1, 2], "seeds of each entry's runs", min_length=1)
    budgets: list[Literal["samples", "compute"]] = operational(
        ["samples"], "equal samples, equal arithmetic (the reference's), or both", min_length=1
    )
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = operational(
        [1.0], "shares of the training rows: several give the curve of data efficiency", min_length=1
    )
    reference: str = operational("simla", "the entry that all others are compared with")
    concurrent: int | None = operational(None, "runs at a time; null: as many as the cluster holds", ge=1)
    timeout_s: float | None = operational(None, "a run that takes longer is given up; null: none is", gt=0)
    metrics: list[str] = operational(
        [
            "retrieval/itc/t2i_r10",
            "retrieval/itc/i2t_r10",
            "retrieval/itm/t2i_r10",
            "match/auc_random",
            "keywords/ap",
            "grounding/pointing",
            "words/color_right",
        ],
        "metrics of the final evaluation that the table shows: task/metric",
        min_length=1,
    )

    @model_validator(mode="after")
    def _rules(self) -> Comparison:
        problems = []
        for name in ("chosen", "seeds", "budgets", "fractions", "metrics"):
            values = getattr(self, name) or []
            problems += [f"{name}: {v} stands twice" for v in dict.fromkeys(values) if values.count(v) > 1]
        for name, entry in self.entries.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                problems.append(f"entries: {name!r} must be letters, digits, - and _: it names folders")
            if not isinstance(entry.get("description", ""), str):
                problems.append(f"entries.{name}.description: {entry['description']!r} is not a text")
        for metric in self.metrics:
            if not re.fullmatch(r"[a-z_]+(/[a-z0-9_]+)+", metric):
                problems.append(f"metrics: {metric} is not like retrieval/itc/t2i_r10 or keywords/ap")
        if self.chosen is not None and not self.chosen:
            problems.append("chosen: is empty; null is the standard ones")
        if problems:
            raise ValueError("\n".join(problems))
        return self


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison whose every run can start. ``comparison`` holds the chosen entries only."""

    comparison: Comparison
    shared: dict[str, Any]

    @property
    def entries(self) -> list[str]:
        """Names of what is compared, in the order of the table."""
        return list(self.comparison.entries)

    @property
    def base(self) -> Run:
        """The reference's first run, for what is not learned: name, storage, cluster."""
        return self.run(self.comparison.reference, self.comparison.seeds[0])

    def run(self, entry: str, seed: int, over: Mapping[str, Any] | None = None) -> Run:
        """An entry's run with that seed, then ``over``: ``{"a.b": value}``.

        Raises:
            UserError: as ``load_run``.
        """
        problems: list[str] = []
        return validated(self._tree(entry, {"seed": seed}, over or {}, problems), problems)

    def overrides(self, entry: str) -> dict[str, Any]:
        """What makes the entry: ``{"a.b": value}``, method and variant included."""
        return dict(leaves(self._keys(entry)))

    def description(self, entry: str) -> str:
        """One line."""
        return str(self.comparison.entries[entry].get("description", ""))

    def recipe(self, entry: str) -> str | None:
        """The recipe of its own by which an entry trains; None where that is the size's, or held equal."""
        found = [] if self.comparison.controlled else self._recipes(entry)
        return " and ".join(found) or None

    def _recipes(self, entry: str) -> list[str]:
        run = self._first(entry)
        called = str(self.overrides(entry).get("method", run.method))
        return recipe_names(called if called in FORMS else str(run.method), str(run.size))

    def notes(self) -> list[str]:
        """What a controlled comparison holds equal, and what entries go without for that; a sentence each."""
        if not self.comparison.controlled:
            return []
        found = [NOTE]
        runs = {entry: self._first(entry) for entry in self.entries}
        for entry, run in runs.items():
            own = [preset("method", str(run.method)), *(preset("recipe", name) for name in self._recipes(entry))]
            has = dict(leaves(to_dict(run)))
            sets = [p for layer in own for p, value in leaves(layer) if is_held(p, value) and has.get(p) != value]
            if lost := dict.fromkeys(sets):
                found.append(f"{entry} is without what its method or recipe sets otherwise: {', '.join(lost)}.")
        if over_boxes := [entry for entry, run in runs.items() if is_over_boxes(to_dict(run))]:
            first = next(iter(runs.values()))
            of_size = preset("size", str(first.size)).get("data", {}).get("augment", AUGMENT)
            if first.data.augment != of_size:
                found.append(
                    f"All entries only crop and flip pictures (data.augment={first.data.augment}; the size has "
                    f"{of_size}): boxes follow no other turn, and images are made of them in {', '.join(over_boxes)}."
                )
        if of_regions := [entry for entry, run in runs.items() if run.regions is not None]:
            found.append(f"No image tower and none of its weights, but features of regions: {', '.join(of_regions)}.")
        if one_stack := [entry for entry, run in runs.items() if not run.text.depth]:
            found.append(
                f"No text tower, and one stack as deep as the others' image tower: {', '.join(one_stack)}. "
                "See the compute."
            )
        return found

    def augmented_alike(self) -> ComparisonPlan:
        """Controlled and with an entry over boxes: the plan in which all entries have an augmentation that boxes can
        follow, unless the shared keys name one."""
        named = any(path == "data.augment" for path, _ in leaves(self.shared))
        if not self.comparison.controlled or named:
            return self
        trees = [self._tree(entry, {}, {}, []) for entry in self.entries]
        asked = [tree.get("data", {}).get("augment", AUGMENT) for tree in trees if is_over_boxes(tree)]
        if all(augment == FOR_ALL for augment in asked):
            return self
        shared: dict[str, Any] = {}
        for layer in (self.shared, {"data": {"augment": str(FOR_ALL)}}):
            merge(shared, layer)
        return replace(self, shared=shared)

    def _tree(
        self, entry: str, seed: Mapping[str, Any], over: Mapping[str, Any], problems: list[str]
    ) -> dict[str, Any]:
        """An entry's keys over its presets."""
        tree: dict[str, Any] = {}
        for layer in (self.shared, self._keys(entry), seed):
            merge(tree, layer)
        for path, value in over.items():
            merge(tree, nest(path, value))
        return over_presets(tree, problems, controlled=self.comparison.controlled)

    def _first(self, entry: str) -> Run:
        return self.run(entry, self.comparison.seeds[0])

    def _keys(self, entry: str) -> dict[str, Any]:
        return {name: value for name, value in self.comparison.entries[entry].items() if name != "description"}


def load_comparison(
    files: Sequence[Path | str] = (), overrides: Sequence[str] = (), chosen: Sequence[str] = ()
) -> ComparisonPlan:
    """Build a comparison: files in order, the default one without any, then overrides.

    Args:
        chosen: names of entries, in place of ``comparison.chosen``.

    Raises:
        UserError: every wrong key and value at once, and every entry whose run cannot start.
    """
    problems: list[str] = []
    tree = preset("comparison", "entries")
    built_in = list(tree["comparison"]["entries"])
    below = [] if files else [preset("comparison", "default")]
    for layer in (*below, *layers(files, overrides, problems)):
        merge(tree, _with_nested_entries(layer))
    given = tree.pop("comparison", None)
    if not isinstance(given, dict):
        raise UserError("\n".join([*problems, f"comparison: expected keys and values, found {given!r}"]))
    if isinstance(given.get("entries"), dict):
        given = {**given, "entries": {name: entry for name, entry in given["entries"].items() if entry is not None}}
    if chosen:
        given = {**given, "chosen": list(chosen)}
    try:
        comparison = Comparison.model_validate(given)
    except ValidationError as error:
        raise UserError("\n".join([*problems, *explain(error, Comparison, "comparison.")])) from None
    plan = ComparisonPlan(_only_chosen(comparison, built_in, problems), tree).augmented_alike()
    problems += [*_shared_problems(plan), *_entry_problems(plan)]
    if problems:
        raise UserError("\n".join(problems))
    return plan


def to_yaml(plan: ComparisonPlan) -> str:
    """The comparison's file, as stored in its folder; ``load_comparison([file])`` reads it back unchanged."""
    return yaml.safe_dump(plan.shared | {"comparison": plan.comparison.model_dump(mode="json")}, sort_keys=False)


def _with_nested_entries(layer: dict[str, Any]) -> dict[str, Any]:
    """Entries' dotted keys as nested ones, so that layers meet."""
    comparison = layer.get("comparison")
    if not isinstance(comparison, dict) or not isinstance(comparison.get("entries"), dict):
        return layer
    entries: dict[str, Any] = {}
    for name, entry in comparison["entries"].items():
        entries[name] = entry
        if isinstance(entry, dict):
            entries[name] = {}
            for path, value in entry.items():
                merge(entries[name], nest(str(path), value))
    return {**layer, "comparison": {**comparison, "entries": entries}}


def _only_chosen(comparison: Comparison, built_in: Sequence[str], problems: list[str]) -> Comparison:
    entries, chosen = comparison.entries, comparison.chosen
    if chosen is None:
        chosen = [name for name in STANDARD if name in entries] + [name for name in entries if name not in built_in]
    for name in chosen:
        if name not in entries:
            known = list(entries)
            problems.append(f"comparison.chosen: {name} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    chosen = [name for name in chosen if name in entries]
    if comparison.reference not in chosen:
        near = did_you_mean(comparison.reference, chosen)
        problems.append(
            f"comparison.reference: {comparison.reference} is not one of the chosen entries "
            f"({', '.join(chosen)}){near}; choose it too, or name another"
        )
    return comparison.model_copy(update={"chosen": chosen, "entries": {name: entries[name] for name in chosen}})


def _shared_problems(plan: ComparisonPlan) -> Iterator[str]:
    """Shared keys that make an entry, or that would undo what its presets set."""
    for path, _ in leaves(plan.shared):
        reasons = [reason for start, reason in NOT_SHARED.items() if _meet(path, start)]
        for entry in plan.entries:
            if reasons:
                break
            keys = plan.overrides(entry)
            method, variant = str(keys.get("method", Method.simla)), keys.get("variant", Variant.default)
            method = str(ALIASES.get(method, FORMS[method][0] if method in FORMS else method))
            if method not in list(Method):
                continue
            own = [preset("method", method), *([preset("official", method)] if variant == Variant.official else [])]
            own = [unheld(layer) for layer in own] if plan.comparison.controlled else own
            if any(_meet(path, other) for layer in own for other, _ in leaves(layer)):
                reasons.append(f"would undo what {entry} has by its method and variant; set it in comparison.entries")
        if reasons:
            yield f"{path}: {reasons[0]}"


def _entry_problems(plan: ComparisonPlan) -> list[str]:
    """What is wrong with the keys of one entry under its name, what is wrong with all of them once."""
    found: dict[str, list[str]] = {}
    for entry in plan.entries:
        wrong = [
            f"{path}: {reason}"
            for path in plan.overrides(entry)
            for start, reason in NOT_OWN.items()
            if _meet(path, start)
        ]
        if plan.comparison.controlled:
            wrong += _held_problems(plan.overrides(entry))
        for fraction in plan.comparison.fractions:
            try:
                plan.run(entry, plan.comparison.seeds[0], {} if fraction == 1.0 else {"data.fraction": fraction})
            except UserError as error:
                wrong += str(error).splitlines()
        found[entry] = list(dict.fromkeys(wrong))
    first = next(iter(found.values()), [])
    every = [line for line in first if all(line in lines for lines in found.values())]
    alone = [f"comparison.entries.{e}.{line}" for e, lines in found.items() for line in lines if line not in every]
    return every + alone


def _held_problems(own: Mapping[str, Any]) -> Iterator[str]:
    """Keys of an entry that a controlled comparison holds equal."""
    for path, value in own.items():
        if path == "variant" and value != Variant.default:
            yield f"{path}: {value} changes pictures and optimiser too, which comparison.controlled holds equal"
        elif is_held(path, value) and not any(_meet(path, start) for start in NOT_OWN):
            yield f"{path}: {_HELD}"


def _meet(path: str, other: str) -> bool:
    """Whether one of two dotted paths holds the other."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")

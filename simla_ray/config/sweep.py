"""A sweep file: an ordinary run config, the base of every trial, and a section ``sweep`` -> one checked plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from simla_ray.config import feasible
from simla_ray.config.enums import ScheduleKind
from simla_ray.config.load import (
    explain,
    layers,
    leaf_kinds,
    load_run,
    merge,
    nest,
    over_presets,
    preset,
    to_dict,
    validated,
)
from simla_ray.config.schema import Distilled, Run
from simla_ray.config.space import Trial, among, complete, flat, lay, suggest
from simla_ray.config.sweep_schema import Sweep, needs_of
from simla_ray.errors import UserError

#: The least share of a run that a trial is given before it may be stopped.
LEAST_GRACE = 1 / 9
#: The base's value of a key that the base does not have, because its section is null.
_ABSENT = object()


@dataclass(frozen=True)
class Plan:
    """A sweep whose every trial can be run."""

    sweep: Sweep
    base: Run

    def run(self, params: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> Run:
        """The base with a trial's params, then ``over``; both ``{"a.b": value}``.

        Raises:
            UserError: as ``load_run``.
        """
        tree = to_dict(self.base)
        for path, value in [*params.items(), *(over or {}).items()]:
            merge(tree, nest(path, value))
        return validated(tree)

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """What a trial, Optuna's for example, draws: path -> value of the parameters whose conditions hold."""
        return suggest(self.sweep.space, trial)

    def default_params(self) -> tuple[dict[str, Any] | None, str | None]:
        """The params that make a trial of the base itself; (None, why) where a value lies outside the space."""
        own = _own_values(self.base, self.sweep.space)
        params = complete(self.sweep.space, {}, own)
        for path in params:
            if not self.sweep.space[path].holds(own[path]):
                found = "no value" if own[path] is _ABSENT else own[path]
                return None, f"{path}: {found} of the base is not in {self.sweep.space[path].to_dict()}"
        return params, None

    def grace(self) -> float:
        """``sweep.grace``, or the latest that ``grace_of`` gives for the base and the ends of the space."""
        if self.sweep.grace is not None:
            return self.sweep.grace
        trials = feasible.ends(self.sweep.space, _own_values(self.base, self.sweep.space))
        return max(grace_of(run) for run in (self.base, *map(self.run, trials)))


def load_sweep(files: Sequence[Path | str] = (), overrides: Sequence[str] = ()) -> Plan:
    """Build a sweep: files in order, the default sweep without any, then overrides (``sweep.trials=20``, ``seed=3``).

    Of ``sweep.space`` too the later wins, parameter by parameter; null removes one.

    Raises:
        UserError: every wrong key and value at once; else what trials of the space cannot be run, and why.
    """
    problems: list[str] = []
    tree: dict[str, Any] = {} if files else _with_flat_space(preset("sweep", "psl"))
    for layer in map(_with_flat_space, layers(files, overrides, problems)):
        above, below = layer.get("sweep"), tree.get("sweep")
        if isinstance(above, dict) and isinstance(below, dict) and isinstance(above.get("space"), dict):
            written = below.get("space")
            space = lay(written if isinstance(written, dict) else {}, above["space"])
            merge(tree, {**layer, "sweep": {name: v for name, v in above.items() if name != "space"}})
            tree["sweep"]["space"] = space
        else:
            merge(tree, layer)
    return _plan(tree, problems)


def _with_flat_space(tree: dict[str, Any]) -> dict[str, Any]:
    sweep = tree.get("sweep")
    if not isinstance(sweep, dict) or "space" not in sweep:
        return tree
    return {**tree, "sweep": {**sweep, "space": flat(sweep["space"])}}


def _plan(tree: dict[str, Any], problems: list[str]) -> Plan:
    given = tree.pop("sweep", None)
    sweep = None
    if given is None:
        problems.append("sweep: missing; a sweep file is a run's config with a section sweep")
    elif not isinstance(given, dict):
        problems.append(f"sweep: expected keys and values, found {given!r}")
    else:
        try:
            sweep = Sweep.model_validate(given)
        except ValidationError as error:
            problems += explain(error, Sweep, "sweep.")
    base = validated(over_presets(tree, problems), problems)
    assert sweep is not None
    plan = _canonical(Plan(sweep, base))
    impossible = feasible.impossible(
        plan.sweep.space, _own_values(base, plan.sweep.space), lambda params: _fault(plan, params)
    )
    lines = [*_base_problems(plan), *(f"sweep.space.{line}" for line in impossible)]
    if lines:
        raise UserError("\n".join(lines))
    return plan


def _base_problems(plan: Plan) -> list[str]:
    sweep, steps = plan.sweep, plan.base.optim.max_steps
    problems = []
    if sweep.trunk_steps and steps is None:
        problems.append(f"optim.max_steps: missing; sweep.trunk_steps={sweep.trunk_steps} needs it")
    elif sweep.trunk_steps and steps is not None and sweep.trunk_steps >= steps:
        problems.append(f"sweep.trunk_steps: {sweep.trunk_steps} is not less than optim.max_steps={steps}")
    for metric, needed in needs_of(sweep).items():
        if needed not in plan.base.objectives.active():
            problems.append(f"sweep.metrics: {metric} needs objectives.{needed}")
    return problems


def _fault(plan: Plan, params: Mapping[str, Any]) -> str | None:
    """Why a trial cannot be run, or cannot be compared with the others."""
    try:
        run = plan.run(params)
    except UserError as error:
        return "; ".join(str(error).splitlines())
    on, of_base = set(run.objectives.active()), set(plan.base.objectives.active())
    if plan.sweep.trunk_steps and on != of_base:
        names = ", ".join(sorted(on ^ of_base))
        return f"objectives.{names}: on in the trial or in the shared trunk only, see sweep.trunk_steps"
    for metric, needed in needs_of(plan.sweep).items():
        if needed in of_base and needed not in on:
            return f"sweep.metrics: {metric} needs objectives.{needed}"
    return None


def _canonical(plan: Plan) -> Plan:
    """Choices as the run has them, so that the base's own value is found among them: YAML reads off as false."""
    own = _own_values(plan.base, plan.sweep.space)
    space: dict[str, dict[str, Any]] = {}
    as_run: dict[str, list[Any]] = {}
    for path, parameter in plan.sweep.space.items():
        space[path] = parameter.to_dict()
        for other, allowed in parameter.when.items():
            raw = plan.sweep.space[other].ends
            space[path]["when"][other] = [as_run[other][i] for i, v in enumerate(raw) if among(v, allowed)]
        if parameter.choice is not None:
            as_run[path] = [_as_run(plan, path, value, own) for value in parameter.choice]
            space[path]["choice"] = as_run[path]
    try:
        return Plan(Sweep.model_validate({**dict(plan.sweep), "space": space}), plan.base)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, Sweep, "sweep."))) from None


def _as_run(plan: Plan, path: str, value: Any, own: Mapping[str, Any]) -> Any:
    space = plan.sweep.space
    try:
        run = plan.run(complete(space, feasible.conditions(space, path) | {path: value}, own))
    except UserError:  # said where all of the space is asked
        return value
    return _own_values(run, [path])[path]


def _own_values(run: Run, paths: Iterable[str]) -> dict[str, Any]:
    tree = to_dict(run)
    found: dict[str, Any] = {}
    for path in paths:
        value: Any = tree
        for name in path.split("."):
            value = value.get(name, _ABSENT) if isinstance(value, dict) else _ABSENT
        found[path] = value
    return found


def grace_of(run: Run) -> float:
    """Fraction of the run after which trials can be judged: every objective is on, no share of soft targets rises.

    At least 1/9, at most 1. ``objectives.psl.start_step`` counts where ``optim.max_steps`` says how long the run is.
    """
    on = run.objectives.active()
    ends = [LEAST_GRACE]
    for name, objective in on.items():
        if isinstance(objective, Distilled) and objective.soft_alpha > 0:
            ends.append(objective.alpha_ramp)
        if run.schedule.kind is ScheduleKind.phases:
            begin = 0.0
            for phase in run.schedule.phases:
                if name in phase.objectives:
                    ends.append(begin)
                    break
                begin = phase.until
    if run.objectives.psl is not None and "psl" in on and run.optim.max_steps is not None:
        ends.append(run.objectives.psl.start_step / run.optim.max_steps)
    return min(1.0, max(ends))


def to_yaml(plan: Plan) -> str:
    """The resolved sweep file, as stored in the sweep's folder; ``load_sweep([file])`` reads it back unchanged."""
    sweep = plan.sweep.model_dump(mode="json", exclude={"space"})
    sweep["space"] = {path: parameter.to_dict() for path, parameter in plan.sweep.space.items()}
    return yaml.safe_dump(to_dict(plan.base) | {"sweep": sweep}, sort_keys=False)


def best_yaml(plan: Plan, params: Mapping[str, Any]) -> str:
    """The config of a trial as a file for ``experiments/pretrain.py --config``: what is learned, and the batch.

    Name and storage are left out, and so are workers, intervals and the like, which a sweep sets for its many small
    runs: they are those of the size. Only where the batch has less work than the size has workers they are fewer.
    """
    run = plan.run(params)
    resolved, kinds = to_dict(run), dict(leaf_kinds(Run))
    tree = {name: value for name, value in resolved.items() if kinds[name] == "identity"}
    tree["data"] = {name: value for name, value in resolved["data"].items() if kinds[f"data.{name}"] == "identity"}
    tree |= {"batch": resolved["batch"], "eval": {"best": run.eval.best}}
    workers = load_run(overrides={"size": str(run.size)}).ray.workers
    if workers > run.micro_batches:
        tree["ray"] = {"workers": run.micro_batches}
    return yaml.safe_dump(tree, sort_keys=False)

"""Whether every trial of a space can be run, asked of the loader before the first one starts.

Asked are each parameter's ends and choices alone over the base, all combinations of the choices with the ranges at
their low and at their high ends, and some random draws. What cannot be is cut down to the values that it takes.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from simla_ray.config.load import leaf_kinds, suggest_key
from simla_ray.config.schema import Run
from simla_ray.config.space import Space, complete, conditions, suggest

#: Combinations of choices that are asked; of more than these as many are drawn.
MOST = 256
DRAWS = 64
#: Impossible combinations that are named.
NAMED = 5

_OWN = "is the sweep's own; set it beside the sweep"
_AXIS = "is the same for all trials; experiments/compare.py compares methods"
_DATA = "is the same for all trials: they are compared on the same data"
_BUDGET = "is the same for all trials: they have the same budget"
#: Keys that a space cannot have, by how their paths begin.
FIXED = {
    "name": _OWN,
    "storage": _OWN,
    "seed": "is the same for all trials; sweep.seeds says with how many others the best is trained again",
    "method": _AXIS,
    "variant": _AXIS,
    "size": _AXIS,
    "task": _AXIS,
    "init_from": "is the same for all trials",
    "world": _DATA,
    "data.fraction": _DATA,
    "data.val": _DATA,
    "data.val_split": _DATA,
    "data.test": _DATA,
    "data.test_split": _DATA,
    "optim.max_steps": _BUDGET,
    "optim.epochs": _BUDGET,
    "batch.global": _BUDGET,
}
#: What may differ between runs that go on from one trunk.
AFTER_TRUNK = ("objectives", "optim", "teacher.m", "temperature")
#: But not what is read only when training starts.
AT_START = (
    "temperature.kind", "temperature.init", "objectives.psl.bias_log_prior",
    "objectives.answers.head", "objectives.answers.most", "objectives.answers.depth", "objectives.labels.pictures",
)  # fmt: skip


def path_problems(space: Space, after_trunk: bool) -> Iterator[str]:
    """Paths that are no key of a run, or whose values trials cannot differ in; paths from the space on."""
    kinds = dict(leaf_kinds(Run))
    for path in space:
        known = path
        while known and known not in kinds:
            known = known.rpartition(".")[0]
        below = [other for other in kinds if other.startswith(f"{known}.")]
        fixed = [reason for start, reason in FIXED.items() if within(path, start)]
        if not known or (known != path and below):
            yield f"{path}: unknown key{suggest_key(path.split('.'))}"
        elif below:
            yield f"{path}: is a section; give one of its keys ({', '.join(p.rpartition('.')[2] for p in below)})"
        elif fixed:
            yield f"{path}: {fixed[0]}"
        elif kinds[known] != "identity" and known != "batch.micro":
            yield f"{path}: does not change what is learned; set it beside the sweep"
        elif after_trunk and not any(within(path, start) for start in AFTER_TRUNK):
            yield f"{path}: cannot differ after a shared trunk (sweep.trunk_steps); only {', '.join(AFTER_TRUNK)} can"
        elif after_trunk and path in AT_START:
            yield f"{path}: is read when training starts, before a shared trunk ends (sweep.trunk_steps)"


def within(path: str, start: str) -> bool:
    return path == start or path.startswith(f"{start}.")


def impossible(space: Space, base: Mapping[str, Any], fault: Callable[[Mapping[str, Any]], str | None]) -> list[str]:
    """What cannot be run, a line each: the parameter, its value and those it takes besides, and why.

    Args:
        base: the base's own value of every path.
        fault: a trial's params -> why they cannot be run, or None.
    """
    single = _named(space, base, fault, _alone(space))
    if single:
        return single
    return _named(space, base, fault, itertools.chain(_combined(space), _drawn(space)))[:NAMED]


def ends(space: Space, base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Params of trials with one parameter at an end or a choice, all others as near to the base as they can be."""
    return [complete(space, chosen, base) for chosen in _alone(space)]


def _alone(space: Space) -> Iterator[dict[str, Any]]:
    for path, parameter in space.items():
        for value in parameter.ends:
            yield conditions(space, path) | {path: value}


def _combined(space: Space) -> Iterator[dict[str, Any]]:
    choices = {path: parameter.ends for path, parameter in space.items() if parameter.choice is not None}
    combinations = itertools.product(*choices.values())
    if math.prod(map(len, choices.values())) > MOST:
        rng = random.Random(0)
        combinations = iter([tuple(rng.choice(values) for values in choices.values()) for _ in range(MOST)])  # type: ignore[assignment]
    for values in combinations:
        for end in (0, -1):
            ranges = {path: parameter.ends[end] for path, parameter in space.items() if path not in choices}
            yield ranges | dict(zip(choices, values, strict=True))


def _drawn(space: Space) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for _ in range(DRAWS):
        yield suggest(space, _Draws(rng))


class _Draws:
    """A trial that knows nothing of those before it."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log:
            return min(max(math.exp(self.rng.uniform(math.log(low), math.log(high))), low), high)
        return self.rng.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.rng.choice(choices)


def _named(
    space: Space,
    base: Mapping[str, Any],
    fault: Callable[[Mapping[str, Any]], str | None],
    candidates: Iterator[dict[str, Any]],
) -> list[str]:
    lines: dict[tuple[str, ...], str] = {}
    for chosen in candidates:
        if fault(complete(space, chosen, base)) is None:
            continue
        for path in list(chosen):  # leave out what is not needed for it
            fewer = {name: value for name, value in chosen.items() if name != path}
            if fault(complete(space, fewer, base)) is not None:
                chosen = fewer
        params = complete(space, chosen, base)
        values = {path: params[path] for path in chosen} or params
        *others, path = values
        said = f"{path}: {_said(values[path])}"
        if others:
            said += f" with {', '.join(f'{other}={_said(values[other])}' for other in others)}"
        lines.setdefault(tuple(values), f"{said} cannot be run ({fault(params)})")
    return list(lines.values())


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

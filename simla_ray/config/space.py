"""The space of a sweep: parameters with ranges, choices and conditions, flat under dotted paths of a run's keys.

A trial draws define-by-run: a parameter whose condition does not hold is not among its params, and the base's own
value counts. Anything that suggests floats, ints and choices can be asked, Optuna's trials among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from pydantic import model_validator

from simla_ray.config.schema import Section, identity

#: What a parameter can be; exactly one of them is given.
RANGES = ("uniform", "log", "int")
KINDS = (*RANGES, "choice")


class Trial(Protocol):
    """What a parameter is drawn from."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Parameter(Section):
    """Exactly one of ``uniform``, ``log``, ``int`` and ``choice``."""

    uniform: tuple[float, float] | None = identity(None, "[lowest, highest], evenly")
    log: tuple[float, float] | None = identity(None, "[lowest, highest] above 0, evenly in the logarithm")
    int_: tuple[int, int] | None = identity(None, "[lowest, highest], whole numbers, both included", alias="int")
    choice: list[Any] | None = identity(None, "at least two values: words, numbers, true, false, null")
    when: dict[str, list[Any]] = identity(
        {}, "drawn only where parameters that stand earlier have these values: {path: value or [values]}"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for name in RANGES:
            found = values.get(name)
            if isinstance(found, (list, tuple)) and any(isinstance(v, bool) for v in found):
                raise ValueError(f"{name}: {found} must be two numbers")
        when = values.get("when")
        if isinstance(when, Mapping):
            when = {path: list(v) if isinstance(v, (list, tuple)) else [v] for path, v in when.items()}
            return {**values, "when": when}
        return values

    @model_validator(mode="after")
    def _rules(self) -> Parameter:
        given = [name for name in KINDS if self._given(name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"{given[-1] if given else 'choice'}: give one of {', '.join(KINDS)}, found {found}")
        if self.choice is not None:
            _check_choice("choice", self.choice, least=2)
        else:
            low, high = self.range
            if low >= high:
                raise ValueError(f"{given[0]}: [{low}, {high}] must rise")
            if self.log is not None and low <= 0:
                raise ValueError(f"log: [{low}, {high}] must be above 0")
        for path, allowed in self.when.items():
            _check_choice(f"when.{path}", allowed, least=1)
        return self

    def _given(self, name: str) -> Any:
        return self.int_ if name == "int" else getattr(self, name)

    @property
    def range(self) -> tuple[float, float]:
        """(lowest, highest) of a parameter that is no choice."""
        found = self.uniform or self.log or self.int_
        assert found is not None
        return found

    @property
    def ends(self) -> list[Any]:
        """Every choice, or both ends of the range."""
        return list(self.range) if self.choice is None else list(self.choice)

    def suggest(self, trial: Trial, path: str) -> Any:
        if self.choice is not None:
            return trial.suggest_categorical(path, self.choice)
        if self.int_ is not None:
            return trial.suggest_int(path, *self.int_)
        low, high = self.range
        return trial.suggest_float(path, low, high, log=self.log is not None)

    def holds(self, value: Any) -> bool:
        """Whether the parameter can have that value."""
        if self.choice is not None:
            return among(value, self.choice)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        low, high = self.range
        return low <= value <= high and (self.int_ is None or value == int(value))

    def to_dict(self) -> dict[str, Any]:
        """As it is written in a file."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


Space = Mapping[str, Parameter]


def among(value: Any, values: Sequence[Any]) -> bool:
    """``value in values`` where true is not 1."""
    return any(isinstance(value, bool) == isinstance(v, bool) and value == v for v in values)


def active(parameter: Parameter, params: Mapping[str, Any]) -> bool:
    """Whether the parameter's conditions hold among what was drawn before it."""
    return all(path in params and among(params[path], allowed) for path, allowed in parameter.when.items())


def suggest(space: Space, trial: Trial) -> dict[str, Any]:
    """path -> value of the parameters whose conditions hold, in the order of the space."""
    params: dict[str, Any] = {}
    for path, parameter in space.items():
        if active(parameter, params):
            params[path] = parameter.suggest(trial, path)
    return params


def complete(space: Space, chosen: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's params with the chosen values, and as near to the base as the space allows in all others."""
    params: dict[str, Any] = {}
    for path, parameter in space.items():
        if active(parameter, params):
            if path in chosen:
                params[path] = chosen[path]
            else:
                own = base[path]
                params[path] = own if parameter.holds(own) else parameter.ends[0]
    return params


def conditions(space: Space, path: str) -> dict[str, Any]:
    """Choices under which the parameter is drawn: the first that each condition allows, and theirs in turn."""
    chosen: dict[str, Any] = {}
    for other, allowed in space[path].when.items():
        chosen |= conditions(space, other) | {other: allowed[0]}
    return chosen


def order_problems(space: Space) -> Iterator[str]:
    """Conditions on what stands later, is no choice, or never has the value; paths from the space on."""
    earlier: dict[str, Parameter] = {}
    for path, parameter in space.items():
        for other, allowed in parameter.when.items():
            of = earlier.get(other)
            if of is None:
                found = "stands later in the space" if other in space else "is not in the space"
                yield f"{path}.when.{other}: {found}; conditions are on choices that stand earlier"
            elif of.choice is None:
                yield f"{path}.when.{other}: is a range; conditions are on choices that stand earlier"
            else:
                for value in allowed:
                    if not among(value, of.choice):
                        yield f"{path}.when.{other}: {value} is not one of {of.choice}"
        earlier[path] = parameter


def flat(tree: Any) -> Any:
    """A space as written, nested or under dotted paths -> {path: entry}; the command line nests, files need not."""
    if not isinstance(tree, Mapping):
        return tree
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value and not _is_entry(value):
            found |= {f"{name}.{path}": entry for path, entry in flat(value).items()}
        else:
            found[str(name)] = value
    return found


def lay(space: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """One written space over another: null removes a parameter, a new kind takes the place of the old one."""
    space = dict(space)
    for path, entry in over.items():
        below = space.get(path)
        if entry is None and path in space:
            del space[path]
        elif isinstance(entry, Mapping) and isinstance(below, Mapping):
            new_kind = any(name in entry for name in KINDS)
            space[path] = {name: v for name, v in below.items() if not (new_kind and name in KINDS)} | dict(entry)
        else:
            space[path] = entry
    return space


def _is_entry(node: Mapping[str, Any]) -> bool:
    """Keys of a parameter, wrong ones included: ``log`` is a section of a run too, but then holds keys."""
    if "when" in node or any(not isinstance(node[name], Mapping) for name in KINDS if name in node):
        return True
    return any(v is not None and not isinstance(v, Mapping) for v in node.values())


def _check_choice(name: str, values: Sequence[Any], least: int) -> None:
    for value in values:
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(f"{name}: {value} is not a word, a number, true, false or null")
    twice = [value for i, value in enumerate(values) if among(value, values[:i])]
    if twice:
        raise ValueError(f"{name}: {twice[0]} stands twice")
    if len(values) < least:
        raise ValueError(f"{name}: {list(values)} must have at least {least} value{'s' if least > 1 else ''}")

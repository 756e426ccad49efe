"""YAML files, presets and dotted overrides -> one validated ``Run``.

The same function serves the command line, YAML files, a sweep's flat space and the config stored in a checkpoint.
Layers, later ones win: schema defaults, size preset, method preset, recipes of the method and of its form at the size
(``presets/recipe/<name>-<size>.yaml``, where there is one), variant preset of the method, files, overrides.

A size's own recipe is made for SIMLA's objectives. A method that does not learn by it at that size has one of its own;
it sets no budget and no data, so that comparisons may hold these equal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from simla_ray.config.controlled import unheld
from simla_ray.config.enums import ALIASES, FORMS, Task, Variant
from simla_ray.config.rules import OF_TASKS
from simla_ray.config.schema import Run
from simla_ray.errors import UserError

AXES = ("size", "method", "variant")
#: What fine-tuning takes over from the run whose weights it starts from.
INHERITED = (
    "method", "size", "variant", "joint_width", "queue", "teacher", "temperature", "world", "data", "vision", "regions",
    "tags", "text", "concepts", "codes", "objectives", "batch", "optim", "checkpoint", "eval", "precision",
)  # fmt: skip
#: Keys that say where towers and codes came from; fine-tuning has them from the run it starts from.
STARTS = {"vision": ("weights",), "text": ("weights",), "regions": ("weights",), "codes": ("source",)}
#: Keys of ``data`` that say which data, and not how they are read: other data bring all of them anew.
WHERE = ("train", "weights", "val", "test", "train_split", "val_split", "test_split", "image_roots")


def load_run(
    files: Sequence[Path | str] = (), overrides: Mapping[str, Any] | Sequence[str] = (), *, presets: bool = True
) -> Run:
    """Build a run.

    Args:
        files: YAML files, later ones win.
        overrides: ``{"a.b": value}`` or ``["a.b=value"]``, values in YAML syntax.
        presets: False reads a complete config (a checkpoint's) as it stands.

    Raises:
        UserError: every wrong key and value at once, one line each.
    """
    problems: list[str] = []
    tree = _given(files, overrides, problems)
    if presets:
        tree = over_presets(tree, problems)
    return validated(tree, problems)


def layers(
    files: Sequence[Path | str], overrides: Mapping[str, Any] | Sequence[str], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Files and overrides, a tree each; later ones win."""
    for file in files:
        yield read_yaml(Path(file))
    for path, value in _pairs(overrides, problems):
        yield nest(path, value)


def _given(
    files: Sequence[Path | str], overrides: Mapping[str, Any] | Sequence[str], problems: list[str]
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for layer in layers(files, overrides, problems):
        merge(tree, layer)
    return tree


def validated(tree: Mapping[str, Any], problems: Sequence[str] = ()) -> Run:
    """A complete tree -> a run.

    Raises:
        UserError: what is wrong in it, behind the problems found before.
    """
    try:
        run = Run.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join([*problems, *explain(error)])) from None
    if problems:
        raise UserError("\n".join(problems))
    return run


def load_finetuning(
    start: Run, files: Sequence[Path | str] = (), overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Run:
    """Build the run that fine-tunes what another has trained.

    Architecture, vocabulary, augmentation, data and workers, as far as the batch has work for them, are the other's;
    over them lie the recipe of its size, the preset of the task, files and overrides. Name, seed, cluster and the
    towers' own starting weights are not inherited.

    Raises:
        UserError: as ``load_run``, or no task is named.
    """
    problems: list[str] = []
    given = _given(files, overrides, problems)
    task, allowed = given.get("task"), [str(task) for task in Task]
    if task not in allowed:
        found = "missing" if task is None else f"{task} is not"
        raise UserError(f"task: {found} one of {', '.join(allowed)}{did_you_mean(str(task), allowed)}")
    tree = {name: value for name, value in to_dict(start).items() if name in INHERITED}
    if isinstance(given.get("data"), dict) and "train" in given["data"]:
        tree["data"] = {name: value for name, value in tree["data"].items() if name not in WHERE}
    tree["ray"] = to_dict(start)["ray"] | {"address": None}
    del tree["eval"]["best"]
    tree["objectives"] |= dict.fromkeys(OF_TASKS)  # of another task
    for name, keys in STARTS.items():
        if tree[name] is not None:
            tree[name] |= dict.fromkeys(keys)
    tree["vision"]["pretrained"] = False
    best = {"eval": preset("method", str(start.method)).get("eval", {})}  # of a method without ITC
    for layer in (best, preset("finetune", str(start.size)), preset("task", task)):
        merge(tree, layer)
    workers, least = tree["ray"]["workers"], tree["ray"]["min_workers"]
    tree["ray"] |= {"workers": 1, "min_workers": None}
    merge(tree, given)
    most = validated(tree, problems).micro_batches
    merge(tree, {"ray": {"workers": min(workers, most), "min_workers": least and min(least, most)}})
    merge(tree, given)
    return validated(tree, problems)


def over_presets(tree: dict[str, Any], problems: list[str], *, controlled: bool = False) -> dict[str, Any]:
    """The presets that the axes name, under the tree.

    A wrong axis is noted and left out, so that other mistakes show too. ``controlled`` leaves out, of the method's
    preset and recipes, what a controlled comparison holds equal.
    """
    top: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    form: dict[str, Any] = {}
    called = str(tree.get("method"))
    if called in FORMS:
        method, form = FORMS[called]
        tree = tree | {"method": str(method)}
    if str(tree.get("method")) in ALIASES:
        tree = tree | {"method": str(ALIASES[str(tree["method"])])}
    for axis in AXES:
        field = Run.model_fields[axis]
        value = str(tree.get(axis, field.default))
        allowed = [str(v) for v in field.annotation]  # type: ignore[union-attr]
        if value not in allowed:
            problems.append(f"{axis}: {value} is not one of {', '.join(allowed)}{did_you_mean(value, allowed)}")
            tree = {name: v for name, v in tree.items() if name != axis}
            value = str(field.default)
        chosen[axis] = value
    merge(top, preset("size", chosen["size"]))
    names = recipe_names(called if called in FORMS else chosen["method"], chosen["size"])
    for layer in (preset("method", chosen["method"]), *(preset("recipe", name) for name in names)):
        merge(top, unheld(layer) if controlled else layer)
    if chosen["variant"] == Variant.official:
        merge(top, preset("official", chosen["method"]))
    merge(top, form)
    merge(top, tree)
    return top


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping; ``yaml.safe_load`` only, nothing in it is evaluated."""
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values at the top level, found a {type(tree).__name__}")
    return tree


def to_yaml(run: Run) -> str:
    """The resolved config, as stored in a run's folder; ``load_run([file], presets=False)`` reads it back unchanged."""
    return yaml.safe_dump(to_dict(run), sort_keys=False)


def to_dict(run: Run) -> dict[str, Any]:
    return run.model_dump(mode="json", by_alias=True)


def difference(old: Run, new: Run, kind: str) -> list[tuple[str, Any, Any]]:
    """Keys of that kind (``identity`` or ``operational``) whose values differ: (path, old, new)."""
    kinds = dict(leaf_kinds(Run))
    a, b = dict(leaves(to_dict(old))), dict(leaves(to_dict(new)))
    changed = [path for path in dict.fromkeys([*a, *b]) if a.get(path) != b.get(path)]
    return [(path, a.get(path), b.get(path)) for path in changed if _kind_of(path, kinds) == kind]


def leaves_of(run: Run, kind: str) -> dict[str, Any]:
    """Dotted path -> value of every key of that kind (``identity`` or ``operational``)."""
    kinds = dict(leaf_kinds(Run))
    return {path: value for path, value in leaves(to_dict(run)) if _kind_of(path, kinds) == kind}


def leaf_kinds(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, kind) of every key."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        section = _section_of(field.annotation)
        extra = field.json_schema_extra
        yield path, str(extra["kind"]) if isinstance(extra, dict) else "identity"
        if section is not None:
            yield from leaf_kinds(section, path + ".")


def _kind_of(path: str, kinds: Mapping[str, str]) -> str:
    while path not in kinds:  # below a list or a free mapping the kind is that of the key that holds it
        path = path.rpartition(".")[0]
    return kinds[path]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all that is no filled mapping."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def preset(axis: str, value: str) -> dict[str, Any]:
    """``presets/<axis>/<value>.yaml``."""
    return yaml.safe_load(_file(axis, value).read_text()) or {}


def recipe_names(method: str, size: str) -> list[str]:
    """``<method>-<size>``, names of presets: the method's, then its form's, where it is called by one. None of them: it
    trains by the size's own recipe.
    """
    called = [str(FORMS[method][0]), method] if method in FORMS else [method]
    return [name for m in called if _file("recipe", name := f"{m}-{size}").is_file()]


def _file(axis: str, value: str) -> Traversable:
    return resources.files("simla_ray.config").joinpath(f"presets/{axis}/{value}.yaml")


def _pairs(overrides: Mapping[str, Any] | Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            problems.append(f"{text}: not an override; write key.subkey=value")
            continue
        try:
            yield path, yaml.safe_load(value)
        except yaml.YAMLError:
            problems.append(f"{path}: the value {value!r} is not YAML")


def nest(path: str, value: Any) -> dict[str, Any]:
    """a.b, value -> {a: {b: value}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay one tree over another, key by key; lists and null replace what was there."""
    for name, value in over.items():
        if isinstance(value, Mapping):
            child = base.get(name)
            child = dict(child) if isinstance(child, dict) else {}
            merge(child, value)
            base[name] = child
        else:
            base[name] = value


def explain(error: ValidationError, model: type[BaseModel] = Run, prefix: str = "") -> Iterator[str]:
    """One line per mistake: the key under ``prefix``, what was found, what is allowed."""
    for problem in error.errors():
        path = prefix + ".".join(str(p) for p in problem["loc"])
        kind = problem["type"]
        if kind == "value_error":  # our own rules name their keys themselves, from their section on
            start = path if not path or path.endswith(".") else f"{path}."
            yield from (f"{start}{line}" for line in str(problem["ctx"]["error"]).splitlines())
        elif kind == "extra_forbidden":
            yield f"{path}: unknown key{suggest_key(problem['loc'], model, prefix)}"
        elif kind == "missing":
            yield f"{path}: missing"
        else:
            yield f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}"


def suggest_key(loc: Sequence[str | int], model: type[BaseModel] = Run, prefix: str = "") -> str:
    """What may have been meant by the unknown key at ``loc``: a neighbour, its name elsewhere, or all neighbours."""
    every = [path for path, _ in leaf_kinds(model)]
    parent = ""
    for name in loc[:-1]:  # places in a list and names of entries are no keys
        below = f"{parent}.{name}" if parent else str(name)
        parent = below if below in every else parent
    siblings = [p for p in every if p.rpartition(".")[0] == parent]
    name = str(loc[-1])
    near = difflib.get_close_matches(name, [p.rpartition(".")[2] for p in siblings], n=1)
    if near:
        return f"; did you mean {prefix}{'.'.join([*(str(p) for p in loc[:-1]), near[0]])}?"
    elsewhere = [p for p in every if p.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {prefix}{elsewhere[0]}?"
    return f"; known here: {', '.join(p.rpartition('.')[2] for p in siblings)}" if siblings else ""


def did_you_mean(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""

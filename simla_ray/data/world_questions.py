"""Questions and statements about a scene of the built-in world, answered and labelled by its truth.

What is wanted is drawn before the words: yes or no, true or false, a count. A false statement is a true one of another
scene, or a true one turned round, so that its words alone do not give it away. The words have no letters or digits that
captions lack, so a vocabulary trained on captions spells them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from simla_ray.data.scene import COLORS, RELATIONS, SHAPES, SIZES, draw_scene, fits, holds, offset

Object = dict[str, Any]
Said = dict[str, str]

#: Columns of a world with questions, after the others.
COLUMNS: pa.Schema = pa.schema(
    {
        "qas": pa.list_(pa.struct({"question": pa.string(), "answers": pa.list_(pa.string()), "type": pa.string()})),
        "statements": pa.list_(pa.struct({"text": pa.string(), "label": pa.string()})),
    }
)
VALUES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES}
COUNTS = ("none", "one", "two", "three", "four")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
#: Side of the scenes that false statements are taken from, pixels; only the room for objects depends on it.
OTHER_PX = 48
#: Attempts at one more question or statement before another kind is tried.
ATTEMPTS = 12


def questions_of(seed: int, split: str, i: int, objects: Sequence[Object], n: int) -> dict[str, list[dict[str, Any]]]:
    """``qas`` and ``statements`` of row ``i`` of a split, ``n`` different ones each.

    Args:
        seed: the world's; the draws are a stream of their own, so images and captions do not depend on ``n``.
        objects: the row's scene.
    """
    words = [seed, zlib.crc32(split.encode()), i, zlib.crc32(b"questions")]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
    found: dict[str, list[dict[str, Any]]] = {"qas": [], "statements": []}
    asked: set[str] = set()
    kinds: list[str] = []
    while len(found["qas"]) < n:
        kinds = kinds or [list(QUESTIONS)[k] for k in rng.permutation(len(QUESTIONS)).tolist()]
        kind = kinds.pop()
        wanted = bool(rng.integers(2))
        for _ in range(ATTEMPTS):
            made = QUESTIONS[kind](rng, objects, wanted)
            if made is not None and made[0] not in asked:
                asked.add(made[0])
                found["qas"].append({"question": made[0], "answers": [made[1]], "type": kind})
                break
    while len(found["statements"]) < n:
        label = bool(rng.integers(2))
        many = 1 + int(rng.random() < 0.4)
        for _ in range(ATTEMPTS):
            clauses = _clauses(rng, objects, many, label)
            text = " and ".join(_worded(rng, clause) for clause in clauses)
            if clauses and text not in asked:
                asked.add(text)
                found["statements"].append({"text": text, "label": str(label).lower()})
                break
    return found


def is_true(clause: tuple[Any, ...], objects: Sequence[Object]) -> bool:
    """Whether a scene makes a clause true.

    | clause | |
    |---|---|
    | only, said, n | exactly n objects are as said |
    | at least, said, n | n or more are |
    | all, said | every object is |
    | more, said, other | more objects are as said than as the other |
    | relation, said, name, other | one object that is as said stands so to another that is as the other |
    """
    kind, said, *rest = clause
    n = _count(objects, said)
    if kind == "only":
        return n == rest[0]
    if kind == "at least":
        return n >= rest[0]
    if kind == "all":
        return n == len(objects)
    if kind == "more":
        return n > _count(objects, rest[0])
    return any(
        fits(said, a) and fits(rest[1], b) and holds(rest[0], a["box"], b["box"])
        for a in objects
        for b in objects
        if a is not b
    )


def _ask_color(rng: np.random.Generator, objects: Sequence[Object], _: bool) -> tuple[str, str] | None:
    obj = _pick(rng, objects)
    said = _unique(rng, objects, obj, (("shape",), ("size", "shape")))
    return None if said is None else (f"what color is the {_noun(said)}?", obj["color"])


def _ask_shape(rng: np.random.Generator, objects: Sequence[Object], _: bool) -> tuple[str, str] | None:
    """What the only object of a colour is, or the only one on a side of another."""
    obj = _pick(rng, objects)
    if rng.random() < 0.3:
        said = _unique(rng, objects, obj, (("color",), ("size", "color")))
        return None if said is None else (f"what is the {_noun(said)}?", obj["shape"])
    relation = _pick(rng, tuple(RELATIONS))
    there = [other for other in objects if other is not obj and offset(relation, other["box"], obj["box"]) > 0]
    # Also what lies there by less than the margin would be an answer to some.
    if len(there) != 1 or not holds(relation, there[0]["box"], obj["box"]):
        return None
    said = {key: obj[key] for key in ("color", "shape")}
    return f"what is {_pick(rng, RELATIONS[relation])} the {_noun(said)}?", there[0]["shape"]


def _ask_size(rng: np.random.Generator, objects: Sequence[Object], _: bool) -> tuple[str, str] | None:
    obj = _pick(rng, objects)
    said = _unique(rng, objects, obj, (("shape",), ("color",), ("color", "shape")))
    return None if said is None else (f"is the {_noun(said)} small or large?", obj["size"])


def _ask_count(rng: np.random.Generator, objects: Sequence[Object], _: bool) -> tuple[str, str] | None:
    if rng.random() < 0.1:
        return "how many things are there?", COUNTS[len(objects)]
    key = _pick(rng, tuple(VALUES))
    by_count: dict[int, list[str]] = {}
    for value in VALUES[key]:
        by_count.setdefault(_count(objects, {key: value}), []).append(value)
    n = _pick(rng, tuple(by_count))
    return f"how many {_noun({key: _pick(rng, by_count[n])}, many=True)} are there?", COUNTS[n]


def _ask_exists(rng: np.random.Generator, objects: Sequence[Object], wanted: bool) -> tuple[str, str] | None:
    keys = _pick(rng, (("color", "shape"), ("color", "shape"), ("size", "shape"), ("color",), ("shape",)))
    if wanted:
        obj = _pick(rng, objects)
        said = {key: obj[key] for key in keys}
    elif rng.random() < 0.5:  # what is there, put together otherwise
        said = {key: _pick(rng, objects)[key] for key in keys}
    else:
        said = {key: _pick(rng, VALUES[key]) for key in keys}
    if bool(_count(objects, said)) != wanted:
        return None
    return f"is there a {_noun(said)}?", "yes" if wanted else "no"


def _ask_relation(rng: np.random.Generator, objects: Sequence[Object], wanted: bool) -> tuple[str, str] | None:
    a, b = (objects[k] for k in rng.permutation(len(objects))[:2].tolist())
    relation = _pick(rng, tuple(name for name in RELATIONS if holds(name, a["box"], b["box"])))
    words = _pick(rng, RELATIONS[relation if wanted else OPPOSITE[relation]])
    first, second = (_noun({key: obj[key] for key in ("color", "shape")}) for obj in (a, b))
    return f"is the {first} {words} the {second}?", "yes" if wanted else "no"


#: Type of a question -> what makes one, given the answer wanted where that is yes or no; None where it found none.
QUESTIONS: dict[str, Callable[[np.random.Generator, Sequence[Object], bool], tuple[str, str] | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
}


def _clauses(rng: np.random.Generator, objects: Sequence[Object], many: int, label: bool) -> list[tuple[Any, ...]]:
    """Clauses that are all true of the scene, or not all; none where this attempt failed."""
    if label:
        return [_true_clause(rng, objects) for _ in range(many)]
    if rng.random() < 0.5:
        other, _ = draw_scene(rng, OTHER_PX)
        clauses = [_true_clause(rng, other) for _ in range(many)]
    else:
        clauses = [_true_clause(rng, objects) for _ in range(many)]
        at = int(rng.integers(many))
        clauses[at] = _turned(rng, clauses[at])
    return clauses if not all(is_true(clause, objects) for clause in clauses) else []


def _true_clause(rng: np.random.Generator, objects: Sequence[Object]) -> tuple[Any, ...]:
    clause: tuple[Any, ...]
    while True:
        kind = _pick(rng, ("relation", "relation", "only", "only", "at least", "more", "all"))
        if kind == "relation":
            a, b = (objects[k] for k in rng.permutation(len(objects))[:2].tolist())
            name = _pick(rng, tuple(name for name in RELATIONS if holds(name, a["box"], b["box"])))
            keys = [_pick(rng, (("color", "shape"), ("shape",), ("color",))) for _ in (a, b)]
            clause = (kind, {key: a[key] for key in keys[0]}, name, {key: b[key] for key in keys[1]})
        elif kind == "all":
            clause = (kind, {"size": _pick(rng, SIZES)})
        else:
            key = _pick(rng, tuple(VALUES))
            said = {key: _pick(rng, objects)[key]}
            if kind == "more":
                other = _pick(rng, [value for value in VALUES[key] if value != said[key]])
                clause = (kind, said, {key: other})
            else:
                clause = (kind, said, _count(objects, said) if kind == "only" else 2)
        if is_true(clause, objects):
            return clause


def _turned(rng: np.random.Generator, clause: tuple[Any, ...]) -> tuple[Any, ...]:
    """A clause that is as likely of a scene, and seldom true where this one is."""
    kind, said, *rest = clause
    if kind == "relation":
        return (kind, said, OPPOSITE[rest[0]], rest[1])
    if kind == "more":
        return (kind, rest[0], said)
    (key,) = said
    return (kind, {key: _pick(rng, [value for value in VALUES[key] if value != said[key]])}, *rest)


def _worded(rng: np.random.Generator, clause: tuple[Any, ...]) -> str:
    kind, said, *rest = clause
    if kind == "relation":
        return f"a {_noun(said)} is {_pick(rng, RELATIONS[rest[0]])} a {_noun(rest[1])}"
    if kind == "all":
        return f"all things are {said['size']}"
    if kind == "more":
        return f"there are more {_noun(said, many=True)} than {_noun(rest[0], many=True)}"
    verb = "is" if rest[0] == 1 else "are"
    return f"there {verb} {kind} {COUNTS[rest[0]]} {_noun(said, many=rest[0] > 1)}"


def _noun(said: Said, many: bool = False) -> str:
    """Size, colour and shape, as far as said."""
    noun = said.get("shape", "thing")
    if many:
        noun += "es" if noun.endswith("s") else "s"
    return " ".join([*(said[key] for key in ("size", "color") if key in said), noun])


def _unique(
    rng: np.random.Generator, objects: Sequence[Object], obj: Object, options: Sequence[tuple[str, ...]]
) -> Said | None:
    """What to say of an object so that no other fits; None where no option does it."""
    said = [{key: obj[key] for key in keys} for keys in options]
    said = [one for one in said if _count(objects, one) == 1]
    return _pick(rng, said) if said else None


def _count(objects: Sequence[Object], said: Said) -> int:
    return sum(fits(said, obj) for obj in objects)


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]

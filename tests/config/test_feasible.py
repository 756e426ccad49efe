"""What cannot be run is found before the first trial, and named by the values that it takes."""

import pytest

from simla_ray.config.feasible import DRAWS, MOST, ends, impossible, path_problems
from simla_ray.config.space import Parameter


def space_of(**trees):
    return {path: Parameter.model_validate(tree) for path, tree in trees.items()}


BASE = {"a": 1, "b": "x", "c": 0.5, "d": 0}
SPACE = space_of(a={"int": [0, 9]}, b={"choice": ["x", "y", None]}, c={"uniform": [0, 1], "when": {"b": "y"}})


def lines(fault, space=SPACE, base=BASE):
    return impossible(space, base, fault)


def test_a_space_without_faults_says_nothing():
    asked = []

    def never(params):
        asked.append(params)

    assert lines(never) == []
    assert len(asked) == (2 + 3 + 2) + 3 * 2 + DRAWS
    assert all(("c" in params) == (params["b"] == "y") for params in asked)


def test_one_value_alone_is_named():
    assert lines(lambda p: "too many" if p["a"] == 9 else None) == ["a: 9 cannot be run (too many)"]
    assert lines(lambda p: "no" if p["b"] is None else None) == ["b: null cannot be run (no)"]
    assert lines(lambda p: "no" if p.get("c") == 1 else None) == ["c: 1 with b=y cannot be run (no)"]


def test_a_combination_is_cut_down_to_what_it_takes():
    space = SPACE | space_of(d={"choice": [0, 1]})
    found = lines(lambda p: "together" if p["a"] > 3 and p["d"] == 1 else None, space)
    assert found == ["d: 1 with a=9 cannot be run (together)"]


def test_the_inside_of_a_range_is_asked_too():
    found = lines(lambda p: "odd" if p["a"] % 3 else None, SPACE, BASE | {"a": 0})
    assert len(found) == 1 and found[0].startswith("a: ") and "odd" in found[0]


def test_all_single_faults_come_at_once():
    found = lines(lambda p: "no" if p["a"] == 0 or p["b"] == "y" else None)
    assert found == ["a: 0 cannot be run (no)", "b: y cannot be run (no)"]


def test_many_combinations_are_drawn():
    space = space_of(**{f"k{i}": {"choice": [0, 1, 2]} for i in range(8)})
    asked = []
    assert impossible(space, dict.fromkeys(space, 0), asked.append) == []
    assert len(asked) == 24 + 2 * MOST + DRAWS


def test_ends_hold_everything_else_at_the_base():
    assert ends(SPACE, BASE) == [
        {"a": 0, "b": "x"},
        {"a": 9, "b": "x"},
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y", "c": 0.5},
        {"a": 1, "b": None},
        {"a": 1, "b": "y", "c": 0.0},
        {"a": 1, "b": "y", "c": 1.0},
    ]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("objectives.psl.wieght", "unknown key; did you mean objectives.psl.weight?"),
        ("weight", "unknown key; did you mean objectives.itc.weight?"),
        ("objectives.psl", "is a section; give one of its keys (weight"),
        ("seed", "is the same for all trials; sweep.seeds"),
        ("name", "is the sweep's own"),
        ("method", "experiments/compare.py"),
        ("world.n_val", "compared on the same data"),
        ("data.test", "compared on the same data"),
        ("optim.max_steps", "the same budget"),
        ("batch.global", "the same budget"),
        ("ray.workers", "does not change what is learned"),
        ("eval.pairs", "does not change what is learned"),
    ],
)
def test_paths_that_cannot_be_swept(path, said):
    (line,) = path_problems(space_of(**{path: {"int": [1, 2]}}), False)
    assert line.startswith(f"{path}: ") and said in line


@pytest.mark.parametrize("path", ["optim.lr", "batch.micro", "schedule.mix.itc", "text.width", "data.hflip"])
def test_paths_that_can_be_swept(path):
    assert list(path_problems(space_of(**{path: {"int": [1, 2]}}), False)) == []


def test_after_a_trunk_only_what_training_reads_may_differ():
    def said(path):
        return list(path_problems(space_of(**{path: {"int": [1, 2]}}), True))

    for path in ("objectives.psl.weight", "optim.lr", "teacher.m", "temperature.max"):
        assert said(path) == []
    assert "sweep.trunk_steps" in said("text.dropout")[0] and "sweep.trunk_steps" in said("temperature.init")[0]

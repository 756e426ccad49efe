"""Parameters, conditions, and the two ways in which a space is written."""

import math

import pytest
from pydantic import ValidationError

from simla_ray.config.space import Parameter, active, among, complete, conditions, flat, lay, order_problems, suggest

PSL = "objectives.psl."


def parameter(**tree):
    return Parameter.model_validate(tree)


SPACE = {
    f"{PSL}weight": parameter(log=[2, 100]),
    f"{PSL}recommend": parameter(choice=["soft", "hard", "off"]),
    f"{PSL}recommend_threshold": parameter(log=[0.02, 0.5], when={f"{PSL}recommend": "hard"}),
    f"{PSL}soft_alpha": parameter(uniform=[0, 0.5], when={f"{PSL}recommend": ["soft", "hard"]}),
    f"{PSL}start_step": parameter(int=[0, 60]),
}


class Fixed:
    """Answers what it is told, and notes what it was asked."""

    def __init__(self, **values):
        self.values, self.asked = values, []

    def _answer(self, name, *limits):
        self.asked.append((name, *limits))
        return self.values[name.rpartition(".")[2]]

    def suggest_float(self, name, low, high, *, log=False):
        return self._answer(name, low, high, log)

    def suggest_int(self, name, low, high):
        return self._answer(name, low, high)

    def suggest_categorical(self, name, choices):
        return self._answer(name, *choices)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({}, "choice: give one of uniform, log, int, choice, found none of them"),
        ({"log": [1, 2], "int": [1, 2]}, "int: give one of uniform, log, int, choice, found log and int"),
        ({"uniform": [3, 1]}, "uniform: [3.0, 1.0] must rise"),
        ({"uniform": [1, 1]}, "uniform: [1.0, 1.0] must rise"),
        ({"log": [0, 1]}, "log: [0.0, 1.0] must be above 0"),
        ({"uniform": [False, True]}, "uniform: [False, True] must be two numbers"),
        ({"choice": [1]}, "choice: [1] must have at least 2 values"),
        ({"choice": [[1], [2]]}, "choice: [1] is not a word"),
        ({"choice": [1, 2, 1.0]}, "choice: 1.0 stands twice"),
        ({"choice": [1, 2], "when": {"a": []}}, "when.a: [] must have at least 1 value"),
    ],
)
def test_wrong_parameters_are_refused(tree, said):
    with pytest.raises(ValidationError) as caught:
        parameter(**tree)
    assert said in str(caught.value)


def test_true_is_not_one():
    assert parameter(choice=[1, True, None]).choice == [1, True, None]
    assert among(True, [True]) and not among(True, [1]) and not among(1, [True]) and among(1, [1.0])


def test_a_parameter_is_written_as_it_was_read():
    for tree in ({"log": [0.5, 2.0]}, {"int": [1, 8]}, {"choice": ["a", None, False], "when": {"b": [None]}}):
        assert parameter(**tree).to_dict() == tree


def test_what_a_parameter_holds():
    whole, even, words = parameter(int=[1, 4]), parameter(uniform=[0, 0.3]), parameter(choice=["soft", None])
    assert [whole.holds(v) for v in (1, 4, 2.0, 2.5, 0, True, None, "2")] == [True, True, True] + [False] * 5
    assert even.holds(0) and even.holds(0.3) and not even.holds(0.31) and not even.holds(math.nan)
    assert words.holds(None) and not words.holds("hard")


@pytest.mark.parametrize(
    ("recommend", "drawn"),
    [
        ("soft", ["weight", "recommend", "soft_alpha", "start_step"]),
        ("hard", ["weight", "recommend", "recommend_threshold", "soft_alpha", "start_step"]),
        ("off", ["weight", "recommend", "start_step"]),
    ],
)
def test_draws_obey_conditions_in_the_order_of_the_space(recommend, drawn):
    trial = Fixed(weight=5.0, recommend=recommend, recommend_threshold=0.1, soft_alpha=0.2, start_step=7)
    params = suggest(SPACE, trial)
    assert list(params) == [PSL + name for name in drawn]
    assert params[f"{PSL}start_step"] == 7 and params[f"{PSL}recommend"] == recommend
    assert trial.asked[0] == (f"{PSL}weight", 2.0, 100.0, True)
    assert trial.asked[1] == (f"{PSL}recommend", "soft", "hard", "off")
    assert trial.asked[-1] == (f"{PSL}start_step", 0, 60)


def test_conditions_on_what_was_not_drawn_do_not_hold():
    space = {
        "a": parameter(choice=[1, 2]),
        "b": parameter(choice=[1, 2], when={"a": 1}),
        "c": parameter(int=[0, 9], when={"b": [2]}),
    }
    assert active(space["c"], {"a": 1, "b": 2}) and not active(space["c"], {"a": 2})
    assert conditions(space, "c") == {"a": 1, "b": 2} and conditions(space, "a") == {}
    assert complete(space, conditions(space, "c") | {"c": 3}, {"a": 2, "b": 1, "c": 0}) == {"a": 1, "b": 2, "c": 3}
    assert complete(space, {"c": 3}, {"a": 2, "b": 2, "c": 0}) == {"a": 2}


def test_what_is_not_chosen_is_as_near_to_the_base_as_the_space_allows():
    base = {
        f"{PSL}weight": 20.0,
        f"{PSL}recommend": "soft",
        f"{PSL}recommend_threshold": 0.0,
        f"{PSL}soft_alpha": 0.9,
        f"{PSL}start_step": 0,
    }
    assert complete(SPACE, {f"{PSL}recommend": "hard"}, base) == {
        f"{PSL}weight": 20.0,
        f"{PSL}recommend": "hard",
        f"{PSL}recommend_threshold": 0.02,  # the base's 0 is below the range
        f"{PSL}soft_alpha": 0.0,
        f"{PSL}start_step": 0,
    }


def test_conditions_that_cannot_be():
    space = {
        "a": parameter(int=[1, 2], when={"b": 1}),
        "b": parameter(choice=[1, 2], when={"a": 1}),
        "c": parameter(int=[0, 9], when={"b": [2, 3], "d": 1}),
    }
    assert list(order_problems(space)) == [
        "a.when.b: stands later in the space; conditions are on choices that stand earlier",
        "b.when.a: is a range; conditions are on choices that stand earlier",
        "c.when.b: 3 is not one of [1, 2]",
        "c.when.d: is not in the space; conditions are on choices that stand earlier",
    ]


def test_dotted_and_nested_are_the_same():
    entry, other = {"log": [1, 2]}, {"choice": ["a", "b"], "when": {"x.y": "a"}}
    assert flat({"a.b": entry, "c": other}) == {"a.b": entry, "c": other}
    assert flat({"a": {"b": entry, "c": None, "d": {"when": {"x.y": 1}}}, "log": {"every": entry}}) == {
        "a.b": entry,
        "a.c": None,
        "a.d": {"when": {"x.y": 1}},
        "log.every": entry,
    }
    assert flat({"a": {"unifrom": [0, 1]}}) == {"a": {"unifrom": [0, 1]}}  # a slip is still an entry
    assert flat({"a": {"choice": None}}) == {"a": {"choice": None}}
    assert flat([1]) == [1]


def test_later_spaces_win_parameter_by_parameter():
    below = {"a": {"log": [1, 2], "when": {"x": 1}}, "b": {"int": [1, 2]}, "c": {"choice": [1, 2]}}
    above = {"a": {"uniform": [0, 1]}, "b": None, "c": {"when": {"x": 2}}, "d": {"int": [0, 1]}}
    assert lay(below, above) == {
        "a": {"uniform": [0, 1], "when": {"x": 1}},
        "c": {"choice": [1, 2], "when": {"x": 2}},
        "d": {"int": [0, 1]},
    }
    assert lay({}, {"a": None}) == {"a": None}  # nothing to remove: said where the space is read


def test_optunas_own_trials_can_be_asked():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [suggest(SPACE, study.ask()) for _ in range(30)]
    assert {params[f"{PSL}recommend"] for params in drawn} == {"soft", "hard", "off"}
    for params in drawn:
        assert all(SPACE[path].holds(value) for path, value in params.items())
        assert (f"{PSL}recommend_threshold" in params) == (params[f"{PSL}recommend"] == "hard")

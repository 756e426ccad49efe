"""VQA accuracy against the published rules and a slow count over annotators."""

from itertools import combinations

import numpy as np
import pytest

from simla_ray.evaluation.answers import (
    majority_answer,
    normal,
    question_type,
    vqa_accuracy,
)

#: Examples of visualqa.org/evaluation, and of each rule by itself.
NORMAL = {
    "Yes": "yes",
    "dont": "don't",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "couldntve": "couldn't've",
    "Im here": "i'm here",
    "its": "its",
    "girl's": "girl's",
    "2:50 pm": "2:50 pm",
    "100,978": "100978",
    "left, right": "left right",
    "left,right": "left right",
    "black-and-white": "black and white",
    "black - white": "black white",
    "a red umbrella": "red umbrella",
    "The  man\n in an\tapron": "man in apron",
    "two": "2",
    "None": "0",
    "ten or eleven": "10 or eleven",
    "3.14": "3.14",
    "yes.": "yes",
    "U.S.": "us",
    ".5": ".5",
    "5.": "5",
    "what?!": "what",
    '"stop"': "stop",
    "(blue)": "blue",
    "1/2": "1 2",
    "1 /2": "1 2",
    "50%": "50%",
    "$1,000-5": "$10005",
    "a": "",
    "?": "",
    "": "",
}


@pytest.mark.parametrize("answer", NORMAL)
def test_normal_form(answer):
    assert normal(answer) == NORMAL[answer]


def test_normal_form_is_stable():
    for answer in NORMAL.values():
        assert normal(answer) == answer


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_annotators(matches, accuracy):
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("a red", answers) == pytest.approx(accuracy)
    assert vqa_accuracy("red", answers[::-1]) == pytest.approx(accuracy)


def slow_accuracy(prediction, answers):
    """Over all subsets of all annotators but one, with the answers in their normal form."""
    if len(answers) == 1:
        return float(prediction == answers[0])
    subsets = list(combinations(answers, len(answers) - 1))
    return sum(min(1, subset.count(prediction) / 3) for subset in subsets) / len(subsets)


def test_equals_the_mean_over_subsets():
    rng = np.random.default_rng(0)
    for n in range(1, 13):
        for _ in range(20):
            answers = rng.choice(["red", "blue", "green"], n).tolist()
            for prediction in ("red", "grey"):
                assert vqa_accuracy(prediction, answers) == pytest.approx(slow_accuracy(prediction, answers))


def test_few_annotators():
    assert vqa_accuracy("one", ["1"]) == 1 and vqa_accuracy("2", ["1"]) == 0
    assert vqa_accuracy("red", ["red", "red"]) == pytest.approx(1 / 3)
    assert vqa_accuracy("red", ["red"] * 3) == pytest.approx(2 / 3)
    assert vqa_accuracy("red", ["red", "blue", "blue"]) == pytest.approx(2 / 9)


def test_answers_of_annotators_are_normalised_too():
    assert vqa_accuracy("2", ["Two."] * 5 + ["the two"] * 5) == 1
    assert vqa_accuracy("two", ["two"] * 10) == 1, "also where all say the same"


def test_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("red", [])
    with pytest.raises(ValueError, match="without answers"):
        majority_answer(["what"], [[]])
    with pytest.raises(ValueError, match="no questions"):
        majority_answer([], [])


def test_types():
    assert question_type("How many dogs, please?") == "how many"
    assert question_type("Is the dog red?") == "is the" and question_type("Why?") == "why"


def test_majority_overall_and_by_type():
    types = ["is it", "is it", "is it", "what color", "what color", "what color", "how many"]
    answers = [["yes"], ["Yes."], ["no"], ["red"], ["a red"], ["yes"], ["two"]]
    found = majority_answer(types, answers)
    assert found.overall == "yes"
    assert found.by_type == {"is it": "yes", "what color": "red", "how many": "2"}
    assert found.predict(["what color", "where", "how many"]) == ["red", "yes", "2"]


def test_majority_is_the_constant_with_the_highest_accuracy():
    rng = np.random.default_rng(1)
    words = np.array(["red", "blue", "green", "grey"])
    answers = [rng.choice(words, 10, p=[0.3, 0.3, 0.2, 0.2]).tolist() for _ in range(60)]
    found = majority_answer(["what"] * 60, answers).overall
    mean = {word: np.mean([slow_accuracy(word, said) for said in answers]) for word in words}
    assert mean[found] == max(mean.values())


def test_ties_go_by_the_alphabet():
    assert majority_answer(["x"] * 2, [["red"], ["blue"]]).overall == "blue"
    assert majority_answer(["x"] * 2, [["blue"], ["red"]]).overall == "blue"

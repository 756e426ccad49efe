"""Questions and statements: numbers against loops, baselines, and the same for any number of ranks."""

import itertools
import json

import numpy as np
import pytest
import torch

from simla_ray.data.questions import answer_ids
from simla_ray.data.text import Vocabulary
from simla_ray.evaluation.answers import vqa_accuracy
from simla_ray.evaluation.blind import Blind
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.questions import answer, questions_of
from simla_ray.evaluation.questions import measure as measure_questions
from simla_ray.evaluation.statements import measure as measure_statements
from simla_ray.evaluation.tasks import evaluate, to_json
from simla_ray.evaluation.work import Work
from simla_ray.models.stack import Memory

from .conftest import make_scorer, on_ranks

OFF = {f"objectives__{name}": None for name in ("itc", "itm", "mlm", "mim", "psl")}
ALONE = OFF | {"schedule__kind": "joint", "schedule__phases": [], "eval__best": "last", "teacher": None}
ANSWERS = ("red", "blue", "two", "yes", "no")
QUESTIONS = (("what color is it", ["red", "red", "blue"], "color"), ("is there a ring", ["yes"], "exists"),
             ("how many are there", ["seven"], "count"))  # fmt: skip


@pytest.fixture(scope="module")
def known(vocabulary):
    return Vocabulary(vocabulary.tokenizer, vocabulary.frequency, ANSWERS)


@pytest.fixture(scope="module")
def rows(world_rows):
    """40 images with questions; the first has none that can be used, and is dropped."""
    made = []
    for i, row in enumerate(world_rows["train"][:40]):
        qas = [{"question": q, "answers": list(a), "type": t} for q, a, t in QUESTIONS[: 1 + i % 3]]
        statements = [
            {"text": f"there is {'a star' if i % 3 else 'no ring'}", "label": str(bool(i % 3)).lower()},
            {"text": "who knows", "label": "-"},
        ]
        made.append({**row, "qas": qas if i else [], "statements": statements})
    return made


@pytest.fixture(scope="module")
def blind():
    texts, answers, _ = zip(*(QUESTIONS * 20), strict=True)
    return Blind.fit(texts, answers, 0)


def scorer_of(known, **objective):
    return make_scorer(known, **ALONE, **objective)


@pytest.mark.parametrize("head", ["decoder", "classifier"])
def test_accuracy_is_that_of_a_loop_over_questions(known, rows, blind, head):
    scorer = scorer_of(known, objectives__answers={"head": head, "most": 9})
    data = EvalSet.load(scorer, rows, Work())
    assert data.dropped == {"qas_empty": 1}
    result = measure_questions(data, blind)
    right = []
    for question in questions_of(data):
        tokens = scorer.image_tokens(data.images([question.item]))
        ids, mask = scorer.tokenize([question.text])
        with torch.no_grad():
            states = scorer.model.student.text.encode(ids, mask, Memory(tokens))
            if head == "classifier":
                scores = scorer.model.answer_head(states[:, 0])[0, : len(ANSWERS)]
            else:
                scores = []
                for name in ANSWERS:
                    spelled = torch.from_numpy(answer_ids(known, name, 10))
                    spelled = spelled[spelled != 0][None]
                    logits = scorer.model.decoder(spelled[:, :-1], Memory(states, mask)).log_softmax(-1)
                    scores.append(float(logits[0].gather(1, spelled[0, 1:, None]).sum()))
        right.append(vqa_accuracy(ANSWERS[int(np.argmax(scores))], question.answers))
    m = result.metrics
    assert m["n"] == len(right) == sum(1 + i % 3 for i in range(1, 40))
    assert m["accuracy"] == pytest.approx(np.mean(right))
    n = {kind: of["n"] for kind, of in m["types"].items()}
    assert sum(n.values()) == m["n"] and n["color"] == 39
    assert m["accuracy"] == pytest.approx(sum(of["accuracy"] * of["n"] for of in m["types"].values()) / m["n"])
    low, high = result.intervals["accuracy"]
    assert low <= m["accuracy"] <= high
    reachable = n["color"] * vqa_accuracy("red", ["red", "red", "blue"]) + n["exists"]  # nobody knows "seven"
    assert m["known"] == pytest.approx(reachable / m["n"])


@pytest.mark.parametrize("head", ["decoder", "classifier"])
def test_a_question_nobody_can_answer_counts(known, rows, head):
    """A row whose only question has an unknown answer stays in, and is wrong."""
    scorer = scorer_of(known, objectives__answers={"head": head, "most": 9})
    hard = [{**row, "qas": [{"question": "how many", "answers": ["seven"], "type": None}]} for row in rows[:4]]
    m = measure_questions(EvalSet.load(scorer, hard, Work())).metrics
    assert (m["n"], m["known"], m["accuracy"]) == (4, 0.0, 0.0)


def test_baselines_have_not_seen_the_picture(known, rows, blind):
    """Words tell everything here: the judge of words gets every question, the constant answers what they can."""
    m = measure_questions(EvalSet.load(scorer_of(known, objectives__answers={}), rows, Work()), blind).metrics
    n = {kind: of["n"] for kind, of in m["types"].items()}
    color = vqa_accuracy("red", ["red", "red", "blue"])
    assert m["text_only"] == pytest.approx((n["color"] * color + n["exists"] + n["count"]) / m["n"])
    assert m["majority_of_type"] == pytest.approx(m["text_only"])
    assert m["majority"] == pytest.approx(n["count"] / m["n"])  # of two that are worth as much the first: 7, yes


def test_a_type_that_tells_the_answer_is_no_baseline():
    """Annotators' types of VQAv2 are taken from the answers; words are all that may be known."""
    blind = Blind.fit(["is it red"] * 20 + ["is it wet"] * 20, [["yes"]] * 10 + [["no"]] * 10 + [["red"]] * 20, 0)
    assert blind.said(["is it red"])["majority_of_type"] == ["red"]


def test_baselines_come_back_from_disk(blind, tmp_path):
    blind.save(tmp_path)
    texts = [question for question, _, _ in QUESTIONS]
    assert Blind.load(tmp_path).said(texts) == blind.said(texts)
    assert Blind.load(tmp_path / "nothing") is None


def test_statements_without_a_known_label_are_counted(known, rows):
    scorer = scorer_of(known, objectives__labels={"classes": ["true", "false"]})
    result = measure_statements(EvalSet.load(scorer, rows, Work()))
    m = result.metrics
    assert (m["n"], m["unknown"], m["chance"]) == (40, 40, 0.5)
    assert m["classes"]["true"]["n"] == 26 and m["classes"]["false"]["n"] == 14
    recalls = m["classes"]["true"]["recall"] * 26 + m["classes"]["false"]["recall"] * 14
    assert m["accuracy"] == pytest.approx(recalls / 40)
    assert {e["label"] for e in result.examples} == {"true", "false"}


def test_two_pictures_are_judged_in_their_order(known, rows):
    scorer = scorer_of(known, objectives__labels={"classes": ["true", "false"], "pictures": 2})
    pairs = [{**row, "images": [row["image"], other["image"]]} for row, other in itertools.pairwise(rows)]
    data = EvalSet.load(scorer, pairs, Work())
    result = measure_statements(data)
    assert result.metrics["n"] == 39
    swapped = [{**row, "image": row["images"][1], "images": row["images"][::-1]} for row in pairs]
    other = measure_statements(EvalSet.load(scorer, swapped, Work()))
    assert [e["probability"] for e in result.examples] != [e["probability"] for e in other.examples]
    assert all({"image", "second_image"} <= set(e) for e in result.examples)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("objective", ["answers", "labels"])
def test_any_number_of_ranks_gives_the_same(known, rows, blind, objective, world):
    value = {"answers": {}, "labels": {"classes": ["true", "false"]}}[objective]
    scorers = [scorer_of(known, **{f"objectives__{objective}": value}) for _ in range(world + 1)]
    expected = json.dumps(to_json(evaluate(scorers[0], rows, blind=blind)))

    def run(rank, gather):
        own = rows[rank::world]
        return evaluate(scorers[rank + 1], own, rank=rank, world=world, gather=gather, blind=blind)

    assert [json.dumps(to_json(results)) for results in on_ranks(world, run)] == [expected] * world


def test_what_is_not_learned_is_not_measured(scorer, rows):
    data = EvalSet.load(scorer, rows, Work())
    assert measure_questions(data) == "no objective answers"
    assert measure_statements(data) == "no objective labels"


def test_answers_of_a_question_do_not_depend_on_its_neighbours(known, rows):
    scorer = scorer_of(known, objectives__answers={})
    data = EvalSet.load(scorer, rows, Work())
    tokens = scorer.image_tokens(data.images(range(4)))
    texts = ["what color is it", "is there a ring", "how many are there in the middle of it", "is it red"]
    together = answer(scorer, tokens, torch.arange(4), texts)
    alone = torch.cat([answer(scorer, tokens[i : i + 1], torch.tensor([0]), [texts[i]]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-4)

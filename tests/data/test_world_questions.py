"""Questions and statements of the built-in world: true of the scene, balanced, and no change of anything else."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest

from simla_ray.config.load import load_run
from simla_ray.data import world
from simla_ray.data.scene import RELATIONS, draw_scene
from simla_ray.data.text import clean
from simla_ray.data.world_questions import COUNTS, QUESTIONS, questions_of
from simla_ray.errors import UserError
from simla_ray.orchestration.prepare import world_folder

N = 6
SIDES = {words: name for name, wordings in RELATIONS.items() for words in wordings}
SIDE = "|".join(sorted(map(re.escape, SIDES), key=len, reverse=True))
NAME = r"(?:small |large )?(?:\w+ )?\w+"


@pytest.fixture(scope="module")
def scenes():
    """(objects, questions and statements) of 400 scenes."""
    rows = [world.make_row(7, "train", i, 48, 1) for i in range(400)]
    scenes = [json.loads(row["scene"]) for row in rows]
    return [(scene, questions_of(7, "train", i, scene, N)) for i, scene in enumerate(scenes)]


def fitting(phrase, objects):
    """Objects that a phrase names, word by word: nothing of the generator's."""
    found = []
    for obj in objects:
        words = {obj["size"], obj["color"], obj["shape"], obj["shape"] + "s", obj["shape"] + "es", "thing", "things"}
        if all(word in words for word in phrase.split()):
            found.append(obj)
    return found


def stands(side, a, b):
    """By centres, in the margin of a caption's relation."""
    (ax, ay), (bx, by) = (((o["box"][0] + o["box"][2]) / 2, (o["box"][1] + o["box"][3]) / 2) for o in (a, b))
    by_how_much = {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[SIDES[side]]
    return by_how_much >= 0.15


def answer_to(question, objects):
    """The only answer there is, by reading the question."""
    said = question.removesuffix("?")
    if m := re.fullmatch(r"what color is the (.+)", said):
        (obj,) = fitting(m[1], objects)
        return obj["color"]
    if m := re.fullmatch(r"is the (.+) small or large", said):
        (obj,) = fitting(m[1], objects)
        return obj["size"]
    if m := re.fullmatch(rf"what is ({SIDE}) the ({NAME})", said):
        (there,) = fitting(m[2], objects)
        (obj,) = (o for o in objects if o is not there and stands(m[1], o, there))
        return obj["shape"]
    if m := re.fullmatch(r"what is the (.+)", said):
        (obj,) = fitting(m[1], objects)
        return obj["shape"]
    if m := re.fullmatch(r"how many (.+) are there", said):
        return ("none", "one", "two", "three", "four")[len(fitting(m[1], objects))]
    if m := re.fullmatch(r"is there a (.+)", said):
        return "yes" if fitting(m[1], objects) else "no"
    m = re.fullmatch(rf"is the ({NAME}) ({SIDE}) the ({NAME})", said)
    ((a,), (b,)) = fitting(m[1], objects), fitting(m[3], objects)
    return "yes" if stands(m[2], a, b) else "no"


def holds(statement, objects):
    return all(clause_holds(clause, objects) for clause in statement.split(" and "))


def clause_holds(clause, objects):
    if m := re.fullmatch(r"there (?:is|are) (only|at least) (\w+) (.+)", clause):
        n, said = len(fitting(m[3], objects)), COUNTS.index(m[2])
        return n == said if m[1] == "only" else n >= said
    if m := re.fullmatch(r"there are more (.+) than (.+)", clause):
        return len(fitting(m[1], objects)) > len(fitting(m[2], objects))
    if m := re.fullmatch(r"all things are (\w+)", clause):
        return len(fitting(m[1], objects)) == len(objects)
    m = re.fullmatch(rf"a ({NAME}) is ({SIDE}) a ({NAME})", clause)
    return any(a is not b and stands(m[2], a, b) for a in fitting(m[1], objects) for b in fitting(m[3], objects))


def test_every_answer_and_label_is_the_scenes(scenes):
    for objects, found in scenes:
        assert len({qa["question"] for qa in found["qas"]}) == len({s["text"] for s in found["statements"]}) == N
        for qa in found["qas"]:
            assert qa["answers"] == [answer_to(qa["question"], objects)], (qa, objects)
        for statement in found["statements"]:
            assert statement["label"] == str(holds(statement["text"], objects)).lower(), (statement, objects)


def test_answers_are_not_to_be_guessed_from_the_type(scenes):
    answers = defaultdict(Counter)
    for _, found in scenes:
        for qa in found["qas"]:
            answers[qa["type"]].update(qa["answers"])
    assert set(answers) == set(QUESTIONS)
    n = sum(map(Counter.total, answers.values()))
    assert n == 400 * N and all(0.1 < of_type.total() / n < 0.25 for of_type in answers.values())
    majority = {kind: max(of_type.values()) / of_type.total() for kind, of_type in answers.items()}
    for kind, most in {
        "color": 0.2,
        "shape": 0.2,
        "count": 0.45,
        "size": 0.57,
        "exists": 0.57,
        "relation": 0.57,
    }.items():
        assert majority[kind] < most, (kind, answers[kind])
    assert set(answers["exists"]) == set(answers["relation"]) == {"yes", "no"}


def test_labels_are_not_to_be_guessed_from_the_words(scenes):
    """Of the words that come often none tells true from false, nor does the number of clauses."""
    labels, words = Counter(), defaultdict(Counter)
    for _, found in scenes:
        for statement in found["statements"]:
            labels[statement["label"]] += 1
            for word in {*statement["text"].split(), f"{statement['text'].count(' and ')} ands"}:
                words[word][statement["label"]] += 1
    assert 0.46 < labels["true"] / labels.total() < 0.54
    for word, of_word in words.items():
        if of_word.total() >= 300:
            assert 0.4 < of_word["true"] / of_word.total() < 0.6, (word, of_word)


def test_draws_are_of_their_own(scenes):
    objects, found = scenes[3]
    assert questions_of(7, "train", 3, objects, N) == found
    fewer = questions_of(7, "train", 3, objects, 2)
    assert fewer["qas"] == found["qas"][:2]
    for seed, split, i in ((8, "train", 3), (7, "val", 3), (7, "train", 4)):
        assert questions_of(seed, split, i, objects, N) != found


def test_a_small_scene_has_room_for_the_most_questions():
    for i in range(40):
        objects, _ = draw_scene(np.random.default_rng(i), 48)
        found = questions_of(0, "train", i, objects[:2], 20)
        assert len(found["qas"]) == len(found["statements"]) == 20


def test_a_vocabulary_of_captions_spells_them(scenes, vocabulary):
    for _, found in scenes:
        texts = [qa["question"] for qa in found["qas"]] + [a for qa in found["qas"] for a in qa["answers"]]
        for text in texts + [s["text"] for s in found["statements"]]:
            assert vocabulary.tokenizer.token_to_id("[UNK]") not in vocabulary.tokenizer.encode(clean(text, 30)).ids, (
                text
            )


def test_shards_have_the_columns_and_everything_else_as_before(tmp_path):
    world._write_shard(tmp_path, "train", 0, 0, 30, 48, 5)
    before = pq.read_table(tmp_path / "train-0000.parquet")
    world._write_shard(tmp_path, "train", 0, 0, 30, 48, 5, 3)
    after = pq.read_table(tmp_path / "train-0000.parquet")
    assert after.schema.names == [*before.schema.names, "qas", "statements"]
    assert after.select(before.schema.names).equals(before)
    for i, row in enumerate(after.to_pylist()):
        assert {name: row[name] for name in ("qas", "statements")} == questions_of(
            5, "train", i, json.loads(row["scene"]), 3
        )


def test_a_world_with_questions_has_a_folder_of_its_own(tmp_path):
    plain = load_run(overrides=[f"storage={tmp_path}"])
    asked = load_run(overrides=[f"storage={tmp_path}", "world.questions=4"])
    assert world_folder(asked).name == f"{world_folder(plain).name}-q4"
    assert plain.world.questions == 0 and "-q" not in world_folder(plain).name
    with pytest.raises(UserError, match=r"world\.questions.*21"):
        load_run(overrides=["world.questions=21"])
    world.generate(tmp_path / "w", {}, 48, 0, questions=2)
    with pytest.raises(UserError, match="holds a world with questions = 2, but None is asked for"):
        world.generate(tmp_path / "w", {}, 48, 0)
    world.generate(tmp_path / "w", {}, 48, 0, questions=2)

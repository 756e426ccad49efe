"""Drawing what a row asks: one question with an answer, or one statement with its label."""

import io
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from simla_ray.config.load import load_run
from simla_ray.data.blocks import rows_table, table_block, table_rows
from simla_ray.data.collate import collate
from simla_ray.data.decode import DropRow
from simla_ray.data.draws import rng_for
from simla_ray.data.map_functions import BlockMaker
from simla_ray.data.questions import Asker, agreed, answer_ids, frequent_answers, task_columns
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.data.text import Vocabulary, build_vocabulary

OFF = [f"objectives.{name}=null" for name in ("itc", "itm", "mlm", "mim", "psl")]
SIZE = [*OFF, "vision.image_px=16", "vision.patch_px=8", "schedule.kind=joint", "schedule.phases=[]", "eval.best=last"]
QAS = [
    {"question": "What color is the dog?", "answers": ["Red", "red", "dark blue"]},
    {"question": "How many?", "answers": ["2"]},
    {"question": "?!", "answers": ["nothing is asked"]},
]
STATEMENTS = [{"text": "a dog", "label": "true"}, {"text": "two dogs", "label": "false"}, {"text": "x", "label": "-"}]


def run_of(*overrides):
    return load_run(overrides=[*SIZE, *overrides])


@pytest.fixture(scope="module")
def words():
    return build_vocabulary(
        ["what color is the dog", "how many dogs", "red dark blue 2 two a x"] * 3, run_of("objectives.answers={}").text
    )


def picture(color=(255, 0, 0)):
    out = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(out, "PNG")
    return out.getvalue()


def row(**columns):
    return {"uid": "u", "image_id": "i", "image": picture(), "captions": ["a dog"], **columns}


def spelled(vocabulary, ids):
    return [vocabulary.token(i) for i in ids]


def test_what_makes_samples_starts_without_torch():
    """Every process that decodes would load it, for seconds, before the first batch."""
    code = "import sys, simla_ray.data.map_functions; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_columns_are_those_of_the_task():
    assert task_columns(run_of("objectives.answers={}")) == ("qas",)
    assert task_columns(run_of("objectives.labels={classes: [a, b]}")) == ("statements",)
    assert task_columns(run_of("objectives.labels={classes: [a, b], pictures: 2}")) == ("statements", "images")
    assert task_columns(load_run()) == ()


def test_answers_are_counted_once_a_question_by_what_most_say():
    qas = [{"answers": ["Red ", "red", "blue"]}, {"answers": ["blue"]}, {"answers": ["red"]}, {"answers": []}]
    assert frequent_answers(qas, 5) == ["red", "blue"]
    assert frequent_answers(qas, 1) == ["red"]
    assert agreed(["b", "a"]) == "a"


def test_an_answer_is_framed_and_cut(words):
    ids = answer_ids(words, "Dark blue!", 4)
    assert spelled(words, ids) == ["[CLS]", "dark", "blue", "[SEP]", "[PAD]"]
    assert spelled(words, answer_ids(words, "red red red red", 3)) == ["[CLS]", "red", "red", "[SEP]"]
    assert spelled(words, answer_ids(words, "?", 3)) == ["[CLS]", "[UNK]", "[SEP]", "[PAD]"]


def test_questions_and_answers_are_drawn_from_seed_epoch_and_uid(words):
    run = run_of("objectives.answers={}")
    make = SampleMaker(run, words, training=True)
    told = Counter()
    for epoch in range(300):
        sample, again = make(row(qas=QAS), epoch), make(row(qas=QAS), epoch)
        assert all(np.array_equal(sample[name], again[name]) for name in sample)
        question = " ".join(spelled(words, sample["token_ids"][1 : sample["n_tokens"]]))
        told[question, " ".join(t for t in spelled(words, sample["answer_ids"]) if t[0] != "[")] += 1
    assert set(told) == {("what color is the dog", "red"), ("what color is the dog", "dark blue"), ("how many", "2")}
    assert 110 < told["how many", "2"] < 190  # half of 300
    assert told["what color is the dog", "red"] > 1.4 * told["what color is the dog", "dark blue"]


def test_validation_takes_the_first_question_and_the_agreed_answer(words):
    sample = SampleMaker(run_of("objectives.answers={}"), words, training=False)(row(qas=QAS), 0)
    assert spelled(words, sample["token_ids"][1 : sample["n_tokens"]]) == ["what", "color", "is", "the", "dog"]
    assert spelled(words, sample["answer_ids"])[1] == "red"


def test_a_classifier_learns_known_answers_only(words):
    known = Vocabulary(words.tokenizer, words.frequency, ["2", "dark blue"])
    make = SampleMaker(run_of("objectives.answers={head: classifier, most: 5}"), known, training=True)
    assert {int(make(row(qas=QAS), epoch)["label"]) for epoch in range(40)} == {0, 1}
    with pytest.raises(DropRow, match="qas_empty"):
        make(row(qas=[{"question": "what", "answers": ["green"]}]), 0)


def test_statements_carry_the_number_of_their_label(words):
    make = SampleMaker(run_of('objectives.labels={classes: ["false", "true"]}'), words, training=True)
    seen = set()
    for epoch in range(40):
        sample = make(row(statements=STATEMENTS), epoch)
        seen.add((" ".join(spelled(words, sample["token_ids"][1 : sample["n_tokens"]])), int(sample["label"])))
    assert {label for _, label in seen} == {0, 1} and len(seen) == 2


@pytest.mark.parametrize(
    ("columns", "reason"),
    [({}, "statements_empty"), ({"statements": [{"text": "a", "label": "maybe"}]}, "label_unknown")],
)
def test_a_row_without_a_usable_statement_is_dropped(words, columns, reason):
    run = run_of('objectives.labels={classes: ["false", "true"]}')
    with pytest.raises(DropRow, match=reason):
        Asker(run, words, training=True)(row(**columns), rng_for(0, 0, "u"))


def test_two_pictures_reach_the_batch(words):
    run = run_of('objectives.labels={classes: ["false", "true"], pictures: 2}', "data.hflip=never", "data.augment=crop")
    make = SampleMaker(run, words, training=True)
    two = row(statements=STATEMENTS, images=[picture(), picture((0, 0, 255))])
    batch = collate(stacked([make(two, epoch) for epoch in range(3)]), run)
    assert batch.second_image.shape == batch.image.shape == (3, 3, 16, 16)
    assert batch.image[:, 0].min() == 255 and batch.second_image[:, 2].min() == 255
    assert batch.label.shape == (3,) and batch.answer_ids is None
    with pytest.raises(DropRow, match="images_not_two"):
        make(row(statements=STATEMENTS), 0)


def test_answers_are_padded_to_the_longest_of_the_batch(words):
    run = run_of("objectives.answers={}")
    make = SampleMaker(run, words, training=False)
    batch = collate(stacked([make(row(qas=[qa]), 0) for qa in QAS[:2]]), run)
    assert batch.answer_ids.shape == (2, 3)


def test_questions_travel_through_both_stages_of_the_stream(words):
    """As Arrow rows; a block in which nothing can be used has the right shapes all the same."""
    run = run_of("objectives.answers={}")
    about = {"lane": 0, "epoch": 0, "offset": 0, "time": 0, "image_id": "i", "captions": []}
    import json

    good = about | {"uid": "u", "image": picture(), "asked": json.dumps(QAS)}
    bad = about | {"uid": "v", "image": picture(), "asked": json.dumps([])}
    table = rows_table([good, bad])
    assert json.loads(table_rows(table)[0]["asked"]) == QAS
    (made,) = BlockMaker(run, words)(table)
    block = table_block(made)
    assert block["drop"].tolist() == ["", "qas_empty"]
    assert block["answer_ids"].shape == (2, 11)
    (made,) = BlockMaker(run, words)(rows_table([bad]))
    assert table_block(made)["answer_ids"].shape == (1, 11)

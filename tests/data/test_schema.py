"""Questions, statements and pairs: what a row makes of them, and that every format hands them on."""

import csv
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from simla_ray.data.convert.rows import TYPES, pictures_of, schema_of, values_of
from simla_ray.data.decode import DropRow
from simla_ray.data.index import build_index
from simla_ray.data.schema import TRAINING, columns_behind, normalise, resolve_columns, training_columns
from simla_ray.data.sources import read_rows, read_words
from simla_ray.errors import UserError

QAS = [
    {"question": "what color is it?", "answers": ["red"] * 9 + ["dark red"], "type": "other"},
    {"question": "is it round?", "answers": ["yes"], "type": None},
]
STATEMENTS = [{"text": "it is round", "label": "true"}, {"text": "it is blue", "label": "false"}]
TEXTS = ["what color is it?", "is it round?", "it is round", "it is blue"]


def jpeg(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def read(uri, columns=None):
    index = build_index([str(uri)], None, (), "data.train")
    return [row for unit in index.units for row in read_rows(unit, np.arange(len(unit)), columns, ())]


def test_captions_come_from_questions_and_statements_where_there_are_none():
    row = normalise({"image": b"x", "qas": [*QAS, QAS[1]], "statements": STATEMENTS}, "u")
    assert row["captions"] == TEXTS and row["qas"] == [*QAS, QAS[1]] and row["image"] == b"x"
    assert normalise({"image": b"x", "captions": ["a ring"], "qas": QAS}, "u")["captions"] == ["a ring"]
    assert normalise({"image": b"x", "captions": None, "qas": QAS}, "u")["captions"] == []  # the column is there
    assert normalise({"image": b"x"}, "u")["captions"] == []


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, "true"), (False, "false"), ("True", "true"), (" FALSE ", "false"), ("entailment", "entailment"), (1, "1")],
)
def test_a_sentence_with_a_label_is_a_statement(label, expected):
    row = normalise({"image": b"x", "sentence": "it is round", "label": label}, "u")
    assert row["statements"] == [{"text": "it is round", "label": expected}]
    assert row["captions"] == ["it is round"] and "sentence" not in row and "label" not in row


@pytest.mark.parametrize("label", [None, "", "  ", math.nan])
def test_a_statement_without_a_label_costs_the_row_if_it_is_the_only_one(label):
    assert normalise({"image": b"x", "sentence": "it is round", "label": label}, "u")["image"] == "statements_empty"
    kept = normalise({"image": b"x", "statements": [*STATEMENTS, {"text": "it is", "label": label}]}, "u")
    assert kept["statements"] == STATEMENTS and kept["image"] == b"x"


@pytest.mark.parametrize(
    ("column", "value", "reason", "left"),
    [
        ("qas", [], "qas_empty", []),
        ("qas", [{"question": "?!", "answers": ["red"]}], "qas_empty", []),
        ("qas", [{"question": "what is it?", "answers": []}], "qas_empty", []),
        ("qas", [{"question": "what is it?", "answers": ["", " ", None]}], "qas_empty", []),
        ("qas", [{"question": "what is it?"}, QAS[1]], b"x", [QAS[1]]),
        ("qas", [QAS[1] | {"answers": ["", "yes"]}], b"x", [QAS[1]]),
        ("qas", [{"question": "how many?", "answers": [3, 2.5]}], b"x",
         [{"question": "how many?", "answers": ["3", "2.5"], "type": None}]),
        ("qas", [{"question": "how many?", "answers": "two"}], b"x",
         [{"question": "how many?", "answers": ["two"], "type": None}]),
        ("qas", "what is it?", "qas_unreadable", []),
        ("qas", ["what is it?"], "qas_unreadable", []),
        ("qas", [{"question": ["what"], "answers": ["red"]}], "qas_unreadable", []),
        ("qas", [{"question": "what is it?", "answers": [{"answer": "red"}]}], "qas_unreadable", []),
        ("qas", [{"question": "what \ud800", "answers": ["red"]}], "qas_unreadable", []),
        ("statements", [{"text": "...", "label": "true"}], "statements_empty", []),
        ("statements", [{"text": None, "label": "true"}, STATEMENTS[0]], b"x", STATEMENTS[:1]),
        ("statements", {"text": "it is", "label": "true"}, "statements_unreadable", []),
        ("statements", [{"text": "it is", "label": ["true"]}], "statements_unreadable", []),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_left_out_and_costs_the_row_if_nothing_is_left(column, value, reason, left):
    row = normalise({"image": b"x", column: value}, "u")
    assert (row["image"], row[column]) == (reason, left)


def test_a_row_with_captions_stays_whatever_it_asks():
    row = normalise({"image": b"x", "captions": ["a ring"], "qas": [], "statements": [{"text": "", "label": "a"}]}, "u")
    assert (row["image"], row["qas"], row["statements"]) == (b"x", [], [])


def test_a_column_without_a_value_is_absent():
    row = normalise({"image": b"x", "captions": ["a ring"], "qas": None, "statements": None, "images": None}, "u")
    assert row == {"uid": "u", "image_id": "u", "image": b"x", "captions": ["a ring"]}


def test_a_pair_has_the_first_picture_as_image():
    row = normalise({"images": [b"a", {"bytes": b"b", "path": "elsewhere"}], "statements": STATEMENTS}, "u")
    assert (row["image"], row["images"]) == (b"a", [b"a", b"b"])
    assert normalise({"image": b"x", "images": [b"a", b"b"]}, "u")["image"] == b"x"
    wrong = "images_unreadable"
    for images, reason in (([b"a"], wrong), ("ab", wrong), (["a", "b"], wrong), ([b"a", None], "image_missing")):
        row = normalise({"images": images}, "u")
        assert (row["image"], row["images"]) == (reason, [])


def test_columns():
    assert training_columns() == TRAINING == ("uid", "image", "captions", "image_id")
    assert training_columns(["qas", "images"]) == (*TRAINING, "qas", "images")
    with pytest.raises(ValueError, match="no columns of a task: keywords; allowed: qas, statements"):
        training_columns(["keywords"])
    # With captions there pretraining reads what it read before.
    assert columns_behind(TRAINING, {"uid", "image", "captions", "qas", "sentence", "label"}) == set(TRAINING)
    assert columns_behind(["captions"], {"qas"}) == {"captions", "qas", "statements", "sentence", "label"}
    assert resolve_columns(["id", "image", "hypothesis", "gold_label"], "t") == {
        "uid": "id", "image": "image", "sentence": "hypothesis", "label": "gold_label",
    }  # fmt: skip
    assert "label" not in resolve_columns(["image", "caption", "label"], "t")
    assert "sentence" not in resolve_columns(["image", "statements", "sentence", "label"], "t")
    for present in (["image", "sentence"], ["image", "label"], ["image"]):
        with pytest.raises(
            UserError, match=r"t: no column captions or .* \(nor qas, statements, or sentence with label"
        ):
            resolve_columns(present, "t")
    with pytest.raises(UserError, match=r"t: no column image or jpg .* \(nor images\); found qas"):
        resolve_columns(["qas"], "t")


ROWS = [
    {"uid": f"r{i}", "qas": QAS[i % 2 :], "statements": STATEMENTS, "image": jpeg(i), "license": "CC0"}
    for i in range(3)
]


def write_parquet(folder):
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


def write_tar(folder):
    with webdataset.TarWriter(str(folder / "rows.tar")) as sink:
        for row in ROWS:
            sink.write({"__key__": row["uid"], "jpg": row["image"], "json": {k: row[k] for k in row if k != "image"}})
    return folder / "rows.tar"


def with_files(folder):
    for row in ROWS:
        (folder / f"{row['uid']}.jpg").write_bytes(row["image"])
    return [row | {"image": f"{row['uid']}.jpg"} for row in ROWS]


def write_json(folder):
    (folder / "rows.json").write_text(json.dumps(with_files(folder)))
    return folder / "rows.json"


def write_csv(folder):
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uid", "image", "qas", "statements"])
        for row in with_files(folder):
            writer.writerow([row["uid"], row["image"], json.dumps(row["qas"]), json.dumps(row["statements"])])
    return folder / "rows.csv"


@pytest.mark.parametrize("write", [write_parquet, write_tar, write_json, write_csv])
def test_every_format_hands_on_questions_and_statements(write, tmp_path):
    uri = write(tmp_path)
    for columns in (None, training_columns(["qas", "statements"])):
        for row, expected in zip(read(uri, columns), ROWS, strict=True):
            assert (row["qas"], row["statements"]) == (expected["qas"], STATEMENTS)
            assert row["captions"] == [qa["question"] for qa in expected["qas"]] + TEXTS[2:]
    plain = read(uri, TRAINING)
    assert all(set(row) == set(TRAINING) for row in plain)
    assert [row["captions"] for row in plain] == [row["captions"] for row in read(uri)]
    (unit, *_) = build_index([str(uri)], None, (), "d").units
    assert read_words(unit, ())[0] == (plain[0]["uid"], plain[0]["captions"])


def test_a_table_with_sentences_and_labels(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "rows.csv").write_text("image,sentence,label\na.jpg,it is round,True\na.jpg,it is blue,false\n")
    assert [row["statements"] for row in read(tmp_path / "rows.csv", training_columns(["statements"]))] == [
        [{"text": "it is round", "label": "true"}], [{"text": "it is blue", "label": "false"}],
    ]  # fmt: skip
    assert [row["captions"] for row in read(tmp_path / "rows.csv", TRAINING)] == [["it is round"], ["it is blue"]]


def test_pairs_in_a_list_are_read_from_its_folder(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    pairs = [["a.jpg", "b.jpg"], ["a.jpg", "c.jpg"], ["a.jpg", "../b.jpg"], ["a.jpg", 3]]
    rows = [{"images": pair, "sentence": "one of them is red", "label": "True"} for pair in pairs]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read(tmp_path / "rows.json", training_columns(["images", "statements"]))
    assert (found[0]["image"], found[0]["images"]) == (b"a", [b"a", b"b"])
    assert [row["image"] for row in found[1:]] == ["image_missing", "image_outside_roots", "images_unreadable"]
    assert read(tmp_path / "rows.json", TRAINING)[0]["image"] == b"a"
    assert "images" not in read(tmp_path / "rows.json", TRAINING)[0]


def test_pretraining_does_not_read_what_it_does_not_need(tmp_path):
    rows = [{"uid": "u", "image": jpeg(), "captions": ["a ring"], "qas": "no questions", "sentence": 3, "label": [1]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", TRAINING)[0]["image"] == jpeg()
    assert read(tmp_path / "rows.parquet", training_columns(["qas"]))[0]["image"] == "qas_unreadable"
    assert read(tmp_path / "rows.parquet")[0]["image"] == "statements_unreadable"


def test_the_columns_are_written_and_read_again(tmp_path):
    row = normalise({"uid": "u", "qas": QAS, "images": [jpeg(0), jpeg(1)], "sentence": "it is", "label": True}, "f:0")
    written = values_of(row) | pictures_of(row, 10**6, None)
    assert written["image"] is None and written["images"] == [jpeg(0), jpeg(1)]
    table = pa.Table.from_pylist([written], schema=schema_of(TYPES))
    pq.write_table(table, tmp_path / "rows.parquet")
    (again,) = read(tmp_path / "rows.parquet")
    assert {name: again[name] for name in row} == row
    with pytest.raises(DropRow, match="image_unreadable"):
        pictures_of(row | {"images": [jpeg(), b"<html>"]}, 10**6, None)
    small = pictures_of(row, 10**6, 15)["images"]
    assert [Image.open(io.BytesIO(image)).size for image in small] == [(15, 10)] * 2


@pytest.mark.parametrize("name", ["tags", "region_feats"])
def test_a_column_of_other_people_by_a_name_of_ours_costs_no_row(name: str):
    row = normalise({"image": b"picture", "captions": ["a dog"], name: "dog cat"}, "a")
    assert row["image"] == b"picture" and row["captions"] == ["a dog"] and row.get(name) is None

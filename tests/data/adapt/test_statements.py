"""SNLI-VE, NLVR2, NLVR and tables of statements: the rows that come of them, and what is dropped on the way."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.adapt.files import (
    adapt,
    dropped,
    manifest,
    picture,
    read,
    write_json,
    write_lines,
    write_table,
)


def test_snli_ve(tmp_path, images):
    def entry(photo, number, text, label):
        return {"Flickr30K_ID": photo, "annotator_labels": [label], "captionID": f"{photo}.jpg#1", "gold_label": label,
                "pairID": f"{photo}.jpg#{number}", "sentence1": "A dog runs .", "sentence2": text}  # fmt: skip

    entries = [
        entry("123", "1e", "An animal runs .", "entailment"),
        entry("123", "1c", "A cat sleeps .", "contradiction"),
        entry("456", "1n", "The dog is hungry .", "neutral"),
        entry("123", "2n", "A dog is wet .", "-"),
        entry("123", "3n", "A dog is old .", "perhaps"),
        entry("123", "4n", " . ", "neutral"),
    ]
    file, folder = write_lines(tmp_path / "snli_ve_dev.jsonl", entries), images("123.jpg", "456.jpg")
    assert adapt("snli-ve", [file], folder, tmp_path / "out", "--split", "dev") == 0
    rows = read(tmp_path / "out")
    assert rows["123"]["statements"] == [
        {"text": "An animal runs .", "label": "entailment"}, {"text": "A cat sleeps .", "label": "contradiction"},
    ]  # fmt: skip
    assert {row["split"] for row in rows.values()} == {"dev"} and list(rows) == ["123", "456"]
    assert dropped(tmp_path / "out") == {
        ("123.jpg#2n", "label_missing"), ("123.jpg#3n", "label_unknown"), ("123.jpg#4n", "statement_empty"),
    }  # fmt: skip


def test_snli_ve_with_the_older_key(tmp_path, images):
    older = [{"Flikr30kID": photo, "gold_label": label, "pairID": "0", "sentence1": "A .", "sentence2": f"A {label} ."}
             for photo, label in (("123.jpg", "neutral"), ("123", "entailment"), ("456.jpg", "neutral"))]  # fmt: skip
    newer = {"Flickr30K_ID": "123", "gold_label": "contradiction", "pairID": "0", "sentence2": "A cat ."}
    file, folder = write_lines(tmp_path / "snli_ve_dev.jsonl", [*older, newer]), images("123.jpg", "456.jpg")
    assert adapt("snli-ve", [file], folder, tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert {uid: (row["image"], len(row["statements"])) for uid, row in found.items()} == {
        "123": (picture(0), 3), "456": (picture(1), 1),
    }  # fmt: skip


def test_nlvr2(tmp_path, images):
    def entry(name, text, label, **more):
        return {"sentence": text, "left_url": "http://x/l.png", "right_url": "http://x/r.png", "identifier": name,
                "label": label, "writer": 0, "synset": "dog", "query": "dogs2", **more}  # fmt: skip

    entries = [
        entry("dev-850-0-0", "There are two dogs.", "True"),
        entry("dev-850-0-1", "Both dogs sleep.", "False"),
        entry("train-4-1-0", "One is red.", "False", directory=21),
        entry("dev-851-0-0", "Missing right picture.", "True"),
        entry("dev-852", "What is it?", "True"),
        entry("dev-850-0-2", "Perhaps.", "Maybe"),
    ]
    folder = images("dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png", "train/21/train-4-1-img0.png",
                    "train/21/train-4-1-img1.png", "dev/dev-851-0-img0.png")  # fmt: skip
    assert adapt("nlvr2", [write_lines(tmp_path / "dev.json", entries)], folder, tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    assert list(rows) == ["dev-850-0", "train-4-1"] and [row["split"] for row in rows.values()] == ["dev", "train"]
    row = rows["dev-850-0"]
    assert row["images"] == [picture(0, kind="PNG"), picture(1, kind="PNG")] and row["image"] == row["images"][0]
    assert row["statements"] == [
        {"text": "There are two dogs.", "label": "true"}, {"text": "Both dogs sleep.", "label": "false"},
    ]  # fmt: skip
    assert "image" not in pq.read_schema(tmp_path / "out" / "data-00000.parquet").names
    assert dropped(tmp_path / "out") == {
        ("dev-851-0", "image_missing"), ("dev-852", "entry_unreadable"), ("dev-850-0-2", "label_unknown"),
    }  # fmt: skip


def test_nlvr2_as_a_list_with_images(tmp_path, images):
    entries = [{"images": ["dev/a-img0.png", "dev/a-img1.png"], "sentence": "Both.", "label": "True"}]
    folder = images("dev/a-img0.png", "dev/a-img1.png")
    assert adapt("nlvr2", [write_json(tmp_path / "nlvr_dev.json", entries)], folder, tmp_path / "out") == 0
    (row,) = read(tmp_path / "out").values()
    assert row["uid"] == "a-img0+a-img1" and len(row["images"]) == 2


def test_nlvr(tmp_path, images):
    def entry(name, text, label):
        boxes = [[{"y_loc": 8, "type": "square", "color": "Yellow", "x_loc": 2, "size": 20}]]
        return {"identifier": name, "sentence": text, "label": label, "directory": "3", "evals": {"r0": label},
                "structured_rep": boxes}  # fmt: skip

    entries = [entry("10-0", "there is a square", "true"), entry("11-0", "no circle", "false"), entry("12-0", "a", "x")]
    names = [f"images/3/dev-10-0-{k}.png" for k in range(6)] + ["images/3/dev-11-0-2.png"]
    assert adapt("nlvr", [write_lines(tmp_path / "dev.json", entries)], images(*names), tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    assert list(rows) == [f"dev-10-0-{k}" for k in range(6)] + ["dev-11-0-2"]
    assert rows["dev-11-0-2"]["statements"] == [{"text": "no circle", "label": "false"}]
    assert {row["split"] for row in rows.values()} == {"dev"}
    assert manifest(tmp_path / "out")["dropped"] == {"label_unknown": 1, "image_missing": 5}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_entailment_joins_a_data_set(kind, tmp_path):
    rows = [
        {"id": f"{n}.jpg", "image": picture(i), "captions": ["x"], "license": "CC0", "split": "all"}
        for i, n in enumerate("ab")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet", row_group_size=1)
    assert adapt("entailment", [write_table(tmp_path, kind)], tmp_path / "set.parquet", tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert list(found) == ["a.jpg", "b.jpg"] and found["b.jpg"]["image"] == picture(1)  # in the order of the set
    assert found["b.jpg"]["statements"] == [
        {"text": "A dog .", "label": "entailment"}, {"text": "A cow .", "label": "contradiction"},
    ]  # fmt: skip
    assert (found["b.jpg"]["license"], found["b.jpg"]["split"]) == ("CC0", "val")
    assert dropped(tmp_path / "out") == {
        ("c.jpg", "image_missing"),
        ("row 4" if kind != "jsonl" else "line 5", "label_missing"),
    }
    assert manifest(tmp_path / "out")["licenses"] == {"CC0": 2}
    assert (
        adapt("entailment", [write_table(tmp_path, kind)], tmp_path / "set.parquet", tmp_path / "val", "--split", "val")
        == 0
    )
    assert list(read(tmp_path / "val")) == ["b.jpg"]


def test_entailment_keeps_splits_apart(tmp_path, images):
    entries = [{"id": "a.jpg", "hypothesis": f"A {split} dog .", "label": "neutral", "split": split}
               for split in ("train", "val", "", "train")]  # fmt: skip
    assert adapt("entailment", [write_lines(tmp_path / "a.jsonl", entries)], images("a.jpg"), tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert {uid: (row.get("split"), row["image_id"]) for uid, row in found.items()} == {
        "a.jpg#train": ("train", "a.jpg"), "a.jpg#val": ("val", "a.jpg"), "a.jpg": (None, "a.jpg"),
    }  # fmt: skip
    assert [statement["text"] for statement in found["a.jpg#val"]["statements"]] == ["A val dog ."]
    assert len(found["a.jpg#train"]["statements"]) == 2


def test_entailment_goes_by_the_picture_that_is_named(tmp_path):
    rows = [{"id": str(i), "image_id": f"photo-{i}", "image": picture(i), "captions": ["x"]} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")

    def entry(number, **more):
        return {"id": number, "hypothesis": f"No. {number} .", "label": "neutral", **more}

    entries = [entry(0, image_id="photo-2"), entry(1, image_id="", image="photo-1"), entry(2, image_id="photo-9"),
               entry(1)]  # fmt: skip
    file = write_lines(tmp_path / "a.jsonl", entries)
    assert adapt("entailment", [file], tmp_path / "set.parquet", tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert {uid: (row["image"], row["statements"][0]["text"]) for uid, row in found.items()} == {
        "photo-2": (picture(2), "No. 0 ."), "photo-1": (picture(1), "No. 1 ."), "1": (picture(1), "No. 1 ."),
    }  # fmt: skip
    assert dropped(tmp_path / "out") == {("photo-9", "image_missing")}

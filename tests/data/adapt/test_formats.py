"""Every format on tiny files in its public layout: the rows that come of it, and what is dropped on the way."""

import csv
import io
import json
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simla_ray.data.adapt.command import FORMATS, main
from simla_ray.data.convert.survey import rows_between
from simla_ray.data.index import build_index

SIZE = (100, 50)


def picture(seed=0, size=SIZE, kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    """Makes files of the given names in a folder of images, and gives the folder."""

    def make(*names, size=SIZE):
        for i, name in enumerate(names):
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i, size, "PNG" if name.endswith(".png") else "JPEG"))
        return tmp_path / "images"

    return make


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def adapt(format, annotations, images, out, *options):
    files = [str(path) for path in annotations]
    return main([format, "--annotations", *files, "--images", str(images), "--out", str(out), *options])


def read(folder):
    index = build_index([str(folder)], None, [], "data.train")
    return {row["uid"]: row for _, row in rows_between(index, 0, len(index))}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def dropped(folder):
    lines = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return {(line["uid"], line["reason"]) for line in lines}


def answers(*texts):
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, 1)]


def vqa_files(folder):
    asked = [
        (42, 42000, "What color is the ball?"),
        (42, 42001, "Is it round?"),
        (42, 42002, "???"),
        (73, 73000, "How many?"),
        (74, 74000, "Is there one?"),
    ]
    questions = {
        "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "val2014",
        "questions": [{"image_id": i, "question": text, "question_id": q} for i, q, text in asked],
    }  # fmt: skip
    said = {
        42000: ("other", "what color is", ["red"] * 8 + ["dark red", "pink"]),
        42001: ("yes/no", "is it", ["yes"] * 9 + [""]),
        42002: ("other", "none of the above", ["x"] * 10),
        73000: ("number", "how many", [" "] * 10),
        74000: ("yes/no", "is there", ["no"] * 10),
    }
    annotations = {
        "info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {},
        "annotations": [
            {"question_type": kind, "multiple_choice_answer": texts[0], "answers": answers(*texts),
             "image_id": q // 1000, "answer_type": answer_type, "question_id": q}
            for q, (answer_type, kind, texts) in said.items()
        ],
    }  # fmt: skip
    return [
        write_json(folder / "v2_questions.json", questions),
        write_json(folder / "v2_annotations.json", annotations),
    ]


def test_vqav2(tmp_path, images, capsys):
    folder, files = (
        images("val2014/COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"),
        vqa_files(tmp_path),
    )
    assert adapt("vqav2", files, folder, tmp_path / "out") == 0
    (row,) = read(tmp_path / "out").values()
    assert (row["uid"], row["image_id"], row["split"]) == ("COCO_val2014_000000000042", "42", "val")
    assert row["qas"] == [
        {"question": "What color is the ball?", "answers": ["red"] * 8 + ["dark red", "pink"], "type": "other"},
        {"question": "Is it round?", "answers": ["yes"] * 9, "type": "yes/no"},
    ]
    assert row["captions"] == ["What color is the ball?", "Is it round?"] and row["image"] == picture(0)
    assert "captions" not in pq.read_schema(tmp_path / "out" / "data-00000.parquet").names
    assert dropped(tmp_path / "out") == {
        ("42001", "answer_empty"), ("42002", "question_empty"), ("73000", "answers_empty"), ("73000", "answer_empty"),
        ("COCO_val2014_000000000074", "image_missing"),
    }  # fmt: skip
    found = manifest(tmp_path / "out")
    assert (found["rows"], found["rows_in"], found["entries"]) == (1, 2, {"qas": 2})
    assert found["dropped"] == {"answer_empty": 11, "question_empty": 1, "answers_empty": 1, "image_missing": 1}
    assert re.search(r"^rows +1 of 2$", capsys.readouterr().out, re.MULTILINE)


def test_vqav2_without_answers(tmp_path, images, capsys):
    questions, annotations = vqa_files(tmp_path)
    folder = images("COCO_val2014_000000000042.jpg")
    assert adapt("vqav2", [questions], folder, tmp_path / "out") == 2
    assert "none of its 5 questions has annotations; give their file too (the answers of a test split" in (
        capsys.readouterr().err
    )
    assert adapt("vqav2", [annotations], folder, tmp_path / "out") == 2
    assert "no file with questions" in capsys.readouterr().err
    assert adapt("vqav2", [questions, annotations], folder, tmp_path / "out", "--split", "train") == 2
    assert "--split: train is not in" in (error := capsys.readouterr().err) and error.endswith("; found val\n")
    assert not (tmp_path / "out").exists()


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


IMAGES = [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 100, "height": 50}]
INSTANCES = {
    "info": {}, "licenses": [], "images": IMAGES, "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 70, "image_id": 7, "category_id": 1, "bbox": [10, 5, 40, 20], "area": 800, "iscrowd": 0},
        {"id": 71, "image_id": 7, "category_id": 2, "bbox": [90, 40, 30.0, 20], "area": 600, "iscrowd": 0},
        {"id": 72, "image_id": 7, "category_id": 2, "bbox": [120, 40, 30, 20], "area": 600, "iscrowd": 0},
    ],
}  # fmt: skip


def ref(number, annotation, split, *texts):
    sentences = [{"tokens": t.split(), "raw": t.upper(), "sent_id": i, "sent": t} for i, t in enumerate(texts)]
    return {"ref_id": number, "ann_id": annotation, "category_id": 1, "image_id": 7, "split": split, "sent_ids": [0],
            "file_name": "COCO_train2014_000000000007_1.jpg", "sentences": sentences}  # fmt: skip


REFS = [ref(0, 70, "val", "the man", "left man"), ref(1, 71, "val", "the dog"), ref(2, 72, "val", "gone dog"),
        ref(3, 70, "testA", "a test"), ref(4, 99, "val", "nobody", "")]  # fmt: skip


def test_refcoco_as_refer_has_it(tmp_path, images):
    files = [write_json(tmp_path / "refs.json", REFS), write_json(tmp_path / "instances.json", INSTANCES)]
    folder = images("COCO_train2014_000000000007.jpg")
    assert adapt("refcoco", files, folder, tmp_path / "out", "--split", "val") == 0
    (row,) = read(tmp_path / "out").values()
    assert row["captions"] == ["the man", "left man", "the dog", "gone dog", "nobody"]
    man, dog = [0.1, 0.1, 0.5, 0.5], [0.9, 0.8, 1.0, 1.0]
    assert row["phrases"] == [
        {"text": "the man", "boxes": [man]}, {"text": "left man", "boxes": [man]}, {"text": "the dog", "boxes": [dog]},
    ]  # fmt: skip
    assert (row["boxes"], row["box_labels"]) == ([man, dog], ["person", "dog"])
    assert (row["uid"], row["image_id"], row["split"]) == ("COCO_train2014_000000000007", "7", "val")
    found = manifest(tmp_path / "out")
    assert found["dropped"] == {"box_without_area": 2, "target_missing": 1, "caption_empty": 1}
    assert found["boxes_clipped"] == 2  # the dog's, as an object and as a target


def test_an_image_in_two_splits_is_two_rows(tmp_path, images):
    refs = [ref(0, 70, "train", "the man"), ref(1, 71, "val", "the dog"), ref(2, 70, "train", "left man")]
    files = [write_json(tmp_path / "refs.json", refs), write_json(tmp_path / "instances.json", INSTANCES)]
    folder = images("COCO_train2014_000000000007.jpg")
    assert adapt("refcoco", files, folder, tmp_path / "out") == 0
    name = "COCO_train2014_000000000007"
    found = read(tmp_path / "out")
    assert {uid: (row["split"], row["captions"]) for uid, row in found.items()} == {
        f"{name}#train": ("train", ["the man", "left man"]), f"{name}#val": ("val", ["the dog"]),
    }  # fmt: skip
    assert [len(row["phrases"]) for row in found.values()] == [2, 1]
    assert {row["image_id"] for row in found.values()} == {"7"} and len(found[f"{name}#val"]["boxes"]) == 2
    assert adapt("refcoco", files, folder, tmp_path / "val", "--split", "val") == 0
    assert list(read(tmp_path / "val")) == [name]


def test_refcoco_as_albef_has_it(tmp_path, images):
    name = "mscoco/train2014/COCO_train2014_000000000007.jpg"
    pairs = [{"image": name, "text": "the man", "ref_id": 0}, {"image": name, "text": "left man", "ref_id": 0},
             {"image": name, "text": "the dog", "ref_id": 1}]  # fmt: skip
    pairs = write_json(tmp_path / "refcoco+_val.json", pairs)
    dets = write_json(tmp_path / "dets.json", {"7": [[0, 0, 50, 25], [200, 0, 5, 5]], "8": [[0, 0, 1, 1]]})
    cocos = write_json(tmp_path / "cocos.json", {"7": [[10, 5, 40, 20]]})
    folder = images("train2014/COCO_train2014_000000000007.jpg")
    assert adapt("refcoco", [pairs, cocos], folder, tmp_path / "a") == 0
    (row,) = read(tmp_path / "a").values()
    assert row["captions"] == ["the man", "left man", "the dog"]
    assert row["boxes"] == [[0.1, 0.1, 0.5, 0.5]] and "phrases" not in row
    refs = [write_json(tmp_path / "refs.json", REFS), write_json(tmp_path / "instances.json", INSTANCES)]
    assert adapt("refcoco", [pairs, dets, cocos, *refs], folder, tmp_path / "b", "--split", "val") == 0
    (row,) = read(tmp_path / "b").values()
    assert row["boxes"] == [[0.0, 0.0, 0.5, 0.5]] and row["phrases"][0]["boxes"] == [[0.1, 0.1, 0.5, 0.5]]
    assert [phrase["text"] for phrase in row["phrases"]] == ["the man", "left man", "the dog"]


def test_refcoco_takes_candidates_with_scores(tmp_path, images):
    pairs = write_json(tmp_path / "pairs.json", [{"image": "COCO_train2014_000000000007.jpg", "text": "the man"}])
    boxes = [[0, 0, 50, 25, 0.97], [10, 5, 40, 20], [200, 0, 5, 5, 0.5], [1, 2, 3], {"bbox": [0, 0, 5, 5]},
             [0, 0, "5", 5, 1]]  # fmt: skip
    dets = write_json(tmp_path / "dets.json", {"7": boxes})
    folder = images("COCO_train2014_000000000007.jpg")
    assert adapt("refcoco", [pairs, dets], folder, tmp_path / "out") == 0
    (row,) = read(tmp_path / "out").values()
    assert row["boxes"] == [[0.0, 0.0, 0.5, 0.5], [0.1, 0.1, 0.5, 0.5]]
    assert manifest(tmp_path / "out")["dropped"] == {"box_unreadable": 3, "box_without_area": 1}


def test_refcoco_does_not_open_pickles(tmp_path, images, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    instances, folder = write_json(tmp_path / "instances.json", INSTANCES), images("a.jpg")
    for name in ("refs(unc).p", "refs.json"):
        (tmp_path / name).write_bytes(pickle.dumps([Bomb()]))
        assert adapt("refcoco", [tmp_path / name, instances], folder, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "a pickle is not opened" in error and "give refs.json" in error
    assert not (tmp_path / "exploded").exists()


def entity_files(folder, number, sentences, objects, size=(200, 100), before=""):
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "Sentences" / f"{number}.txt").write_text("\n".join(sentences) + "\n")
    things = "".join(f"<object><name>{name}</name>{inner}</object>" for name, inner in objects)
    (folder / "Annotations" / f"{number}.xml").write_text(
        f"{before}<annotation><filename>{number}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
        f"<depth>3</depth></size>{things}</annotation>"
    )


def bounds(*edges):
    names = ("xmin", "ymin", "xmax", "ymax")
    inner = "".join(f"<{name}>{edge}</{name}>" for name, edge in zip(names, edges, strict=True))
    return f"<bndbox>{inner}</bndbox>"


def test_flickr30k_entities(tmp_path, images):
    folder = tmp_path / "entities"
    entity_files(
        folder, 1001,
        ["[/EN#5/people Two young men] look at [/EN#6/other/vehicles a bike] in [/EN#8/scene the park] .",
         "[/EN#5/people Men] with [/EN#0/notvisual it] ."],
        [("5", bounds(1, 1, 50, 100)), ("5", bounds(101, 1, 200, 100)), ("6", bounds(21, 51, 120, 140)),
         ("8", "<scene>1</scene><nobndbox>0</nobndbox>")],
    )  # fmt: skip
    entity_files(folder, 1002, ["A cat .", "A [/EN#7/animals cat"], [("7", bounds(1, 1, 2, 2))])
    bomb = '<!DOCTYPE a [<!ENTITY x "aaaa"><!ENTITY y "&x;&x;">]>'
    entity_files(folder, 1003, ["A [/EN#7/animals dog] ."], [("7", bounds(1, 1, 2, 2))], before=bomb)
    (folder / "val.txt").write_text("1001\n1003\n")
    # Half the size that the boxes were drawn at.
    assert adapt("flickr30k-entities", [folder], images("1001.jpg", "1002.jpg", "1003.jpg"), tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    assert rows["1001"]["captions"] == ["Two young men look at a bike in the park .", "Men with it ."]
    men = [[0.0, 0.0, 0.25, 1.0], [0.5, 0.0, 1.0, 1.0]]
    assert rows["1001"]["phrases"] == [
        {"text": "Two young men", "boxes": men},
        {"text": "a bike", "boxes": [[0.1, 0.5, 0.6, 1.0]]},
        {"text": "Men", "boxes": men},
    ]
    assert rows["1002"]["captions"] == ["A cat ."] and not rows["1002"]["phrases"]
    assert rows["1003"]["captions"] == ["A dog ."] and "boxes" not in rows["1001"]
    assert dropped(tmp_path / "out") == {
        ("1001#0 the park", "phrase_without_box"), ("1001#1 it", "phrase_without_box"),
        ("1002#1", "markup_unreadable"), ("1003", "xml_unreadable"),
    }  # fmt: skip
    assert adapt("flickr30k-entities", [folder], images("1001.jpg"), tmp_path / "val", "--split", "val") == 0
    assert {uid: row["split"] for uid, row in read(tmp_path / "val").items()} == {"1001": "val", "1003": "val"}


def test_an_entity_bomb_is_not_expanded(tmp_path, images):
    levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE annotation [<!ENTITY e0 "x">{levels}]><annotation>&e11;</annotation>'
    entity_files(tmp_path / "e", 1, ["A [/EN#7/animals dog] ."], [])
    for content in (bomb.encode(), f'<?xml version="1.0" encoding="UTF-16"?>{bomb}'.encode("utf-16")):
        (tmp_path / "e" / "Annotations" / "1.xml").write_bytes(content)
        out = tmp_path / f"out{len(content)}"
        assert adapt("flickr30k-entities", [tmp_path / "e"], images("1.jpg"), out) == 0
        assert dropped(out) == {("1", "xml_unreadable")}


def test_karpathy(tmp_path, images):
    def entry(number, split, *texts, **more):
        sentences = [{"tokens": t.split(), "raw": t, "imgid": number, "sentid": i} for i, t in enumerate(texts)]
        return {
            "sentids": [0],
            "imgid": number,
            "sentences": sentences,
            "split": split,
            "filename": f"{number}.jpg",
            **more,
        }

    coco = {"filepath": "val2014", "cocoid": 5}
    entries = [entry(0, "restval", "A dog .", "", **coco), entry(1, "val", "A cat .", **coco), entry(2, "train", "A .")]
    file = write_json(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    folder = images("val2014/0.jpg", "val2014/1.jpg", "2.jpg")
    assert adapt("karpathy", [file], folder, tmp_path / "a") == 0
    rows = read(tmp_path / "a")
    assert {uid: row["split"] for uid, row in rows.items()} == {"0.jpg": "train", "1.jpg": "val", "2.jpg": "train"}
    assert rows["0.jpg"]["captions"] == ["A dog ."] and dropped(tmp_path / "a") == {("0.jpg#1", "caption_empty")}
    assert adapt("karpathy", [file], folder, tmp_path / "b", "--restval", "keep", "--split", "restval") == 0
    assert list(read(tmp_path / "b")) == ["0.jpg"]
    assert adapt("karpathy", [file], folder, tmp_path / "c", "--split", "train") == 0
    assert list(read(tmp_path / "c")) == ["0.jpg", "2.jpg"]


TABLE = [
    {"id": "b.jpg", "premise": "x", "hypothesis": "A dog .", "label": "entailment", "split": "val"},
    {"id": "a.jpg", "premise": "x", "hypothesis": "A cat .", "label": "neutral", "split": "train"},
    {"id": "b.jpg", "premise": "x", "hypothesis": "A cow .", "label": "contradiction", "split": "val"},
    {"id": "c.jpg", "premise": "x", "hypothesis": "A hen .", "label": "neutral", "split": "val"},
    {"id": "b.jpg", "premise": "x", "hypothesis": "A bee .", "label": "-", "split": "val"},
]


def write_table(folder, kind):
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    elif kind == "jsonl":
        write_lines(path, TABLE)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, TABLE[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(TABLE)
    return path


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


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n{format} " in text for format in FORMATS)

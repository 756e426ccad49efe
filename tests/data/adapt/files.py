"""Tiny annotation files of public layouts, and what was made of them."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from simla_ray.data.adapt.command import main
from simla_ray.data.convert.survey import rows_between
from simla_ray.data.index import build_index

SIZE = (100, 50)


def picture(seed=0, size=SIZE, kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, kind)
    return buffer.getvalue()


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

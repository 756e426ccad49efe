"""Public sets beside the repository, where they are there (``SIMLA_PACKS_DIR``, else ../shared/packs)."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from simla_ray.data.adapt.command import main
from simla_ray.data.convert.rows import picture_of
from simla_ray.data.index import build_index
from simla_ray.data.schema import TRAINING, training_columns
from simla_ray.data.sources import read_rows

PACKS = Path(os.environ.get("SIMLA_PACKS_DIR", Path(__file__).parents[3] / "shared" / "packs"))


def pack(name):
    path = PACKS / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def first_rows(path, columns, n=40):
    index = build_index([str(path)], None, (), "data.train")
    return len(index), read_rows(index.units[0], np.arange(n), columns, ())


@pytest.mark.parametrize(("name", "rows"), [("daquar_vqa", 794), ("easy_vqa", 5000)])
def test_questions_are_read_as_they_are(name, rows):
    n, found = first_rows(pack(name), training_columns(["qas"]))
    raw = next(pq.ParquetFile(pack(name)).iter_batches(40, columns=["id", "qas"])).to_pylist()
    assert n == rows
    for row, expected in zip(found, raw, strict=True):
        assert row["uid"] == expected["id"]
        assert [(qa["question"], qa["answers"]) for qa in row["qas"]] == [
            (qa["question"].strip(), [answer.strip() for answer in qa["answers"]]) for qa in expected["qas"]
        ]
        assert row["captions"] == list(dict.fromkeys(qa["question"] for qa in row["qas"]))
        picture_of(row, 10**6)


def test_statements_are_made_of_sentence_and_label():
    n, found = first_rows(pack("nlvr1"), training_columns(["statements"]))
    raw = next(pq.ParquetFile(pack("nlvr1")).iter_batches(40, columns=["sentence", "label"])).to_pylist()
    assert n == 3958
    for row, expected in zip(found, raw, strict=True):
        assert row["statements"] == [{"text": expected["sentence"].strip(), "label": str(expected["label"]).lower()}]
        picture_of(row, 10**6)
    assert {row["statements"][0]["label"] for row in found} == {"true", "false"}
    _, plain = first_rows(pack("nlvr1"), TRAINING)
    assert [row["captions"] for row in plain] == [row["captions"] for row in found]


def test_entailment_joins_the_photos(tmp_path):
    """With the small set of photos most ids have none: they are counted, and the others are all there."""
    table, photos = pack("flickr8k_ve"), pack("flickr8k_mini")
    out = tmp_path / "ve"
    assert main(["entailment", "--annotations", str(table), "--images", str(photos), "--out", str(out)]) == 0
    raw = pq.read_table(table, columns=["id", "label", "split"]).to_pylist()
    there = set(pq.read_table(photos, columns=["id"]).column("id").to_pylist())
    index = build_index([str(out)], None, (), "data.train")
    rows = [row for unit in index.units for row in read_rows(unit, np.arange(len(unit)), None, ())]
    assert {row["uid"] for row in rows} == {row["id"] for row in raw} & there
    labels = Counter(s["label"] for row in rows for s in row["statements"])
    assert labels == Counter(row["label"] for row in raw if row["id"] in there)
    splits = {row["id"]: row["split"] for row in raw}
    assert all(row["split"] == splits[row["uid"]] for row in rows)

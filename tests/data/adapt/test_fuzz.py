"""Annotations as strangers may write them: rows, counted drops or one clear error come of it."""

import io
import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from simla_ray.data.adapt.command import FORMATS
from simla_ray.data.adapt.gathered import Gathered
from simla_ray.data.adapt.pictures import FolderPictures
from simla_ray.data.adapt.rows import Rows
from simla_ray.errors import UserError
from tests.data.adapt.files import INSTANCES, REFS, TABLE, bounds, entity_files, vqa_files
from tests.data.test_fuzz import ANYTHING, mutated

NAME = "COCO_train2014_000000000007.jpg"
SENTENCE = {"sentence": "a dog", "label": "True"}
DOCUMENTS = {
    "snli-ve": [{"Flickr30K_ID": "1", "gold_label": "neutral", "sentence2": "a", "pairID": "1#0"}],
    "nlvr2": [SENTENCE | {"identifier": "dev-1-0-0"}, SENTENCE | {"images": [NAME, NAME]}],
    "nlvr": [SENTENCE | {"identifier": "1-0", "directory": 3}],
    "karpathy": {"images": [{"filename": NAME, "split": "val", "sentences": [{"raw": "a dog"}], "filepath": "x"}]},
    "entailment": TABLE,
    "refcoco": [{"image": NAME, "text": "a dog", "ref_id": 0}],
}


def spoiled(document, draw):
    """The document with one of its values, wherever, become something else."""
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 5)) == 0:
        return draw(ANYTHING)
    key = draw(st.sampled_from(list(document) if isinstance(document, dict) else range(len(document))))
    copy = document.copy()
    if isinstance(document, dict) and draw(st.integers(0, 7)) == 0:
        del copy[key]
    else:
        copy[key] = spoiled(document[key], draw)
    return copy


def as_json(value):
    return json.dumps(value, default=lambda b: b.decode("latin-1")).encode()


def cases(folder):
    """(format, files that stay, the file that is spoiled, its document) of every format of JSON."""
    questions, annotations = vqa_files(folder)
    refs, instances = folder / "refs.json", folder / "instances.json"
    refs.write_text(json.dumps(REFS))
    instances.write_text(json.dumps(INSTANCES))
    dets = {"7": [[0, 0, 50, 25]]}
    spoilt = folder / "spoilt.json"
    yield "vqav2", [annotations], spoilt, json.loads(questions.read_text())
    yield "vqav2", [questions], spoilt, json.loads(annotations.read_text())
    yield "refcoco", [instances], spoilt, REFS
    yield "refcoco", [refs], spoilt, INSTANCES
    yield "refcoco", [refs, instances], folder / "dets.json", dets
    for format, document in DOCUMENTS.items():
        yield format, [], spoilt, document


def use(format, files, images):
    gathered = Gathered()
    try:
        FORMATS[format](files, gathered)
        rows = Rows(gathered, FolderPictures(images), 10**6)
        written = sum(len(group) for group in rows.groups())
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert rows.done == len(gathered.records) and written <= rows.done
    assert all(line["reason"] for line in gathered.dropped)
    json.dumps(gathered.dropped, ensure_ascii=False).encode()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(buffer, "JPEG")
    for name in (NAME, "COCO_val2014_000000000042.jpg", "1.jpg", "b.jpg", "dev-1-0-0.png"):
        (folder / name).write_bytes(buffer.getvalue())
    return folder


def fuzz(seconds, check, strategy):
    end = time.monotonic() + seconds
    for number in itertools.count():
        once = settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        seed(number)(once(given(strategy)(check)))()
        if time.monotonic() > end:
            return


@pytest.mark.parametrize("seconds", [0.2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", range(11))
def test_json(case, seconds, tmp_path, images):
    format, files, path, document = list(cases(tmp_path))[case]

    def check(data):
        path.write_bytes(as_json(spoiled(document, data.draw)))
        use(format, [*files, path], images)

    fuzz(seconds, check, st.data())


@pytest.mark.parametrize("seconds", [0.3, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["Sentences/1.txt", "Annotations/1.xml"])
def test_entities(name, seconds, tmp_path, images):
    entity_files(tmp_path, 1, ["A [/EN#7/animals dog] ."], [("7", bounds(1, 1, 20, 20))])
    original = (tmp_path / name).read_bytes()

    def check(content):
        (tmp_path / name).write_bytes(content)
        use("flickr30k-entities", [tmp_path], images)

    fuzz(seconds, check, mutated([original]))

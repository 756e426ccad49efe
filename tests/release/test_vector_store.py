import json
import os

import numpy as np
import pytest

from simla_ray.errors import UserError
from simla_ray.release.vector_store import NAMES, Record, VectorStore

RECORDS = [
    Record("a.jpg", 10, 5, "a.jpg"),
    Record("b\udcff.jpg", 11, 6, "b?.jpg", "image_unreadable"),
    Record("c.jpg", 12, 7, "c.jpg"),
]
VECTORS = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def store(tmp_path):
    store = VectorStore(tmp_path / "cache", "/pictures", "model-1")
    store.save(RECORDS, VECTORS)
    return store


def test_what_is_saved_is_loaded(store):
    said = []
    records, vectors = store.load(said.append)
    assert list(records) == ["a.jpg", "b\udcff.jpg", "c.jpg"] and not said
    assert [record.row for record in records.values()] == [0, None, 1]
    assert records["b\udcff.jpg"].reason == "image_unreadable" and records["c.jpg"].mtime_ns == 7
    np.testing.assert_array_equal(vectors, VECTORS)


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    where = os.fsdecode(os.fsencode(tmp_path) + b"/b\xffd")
    store = VectorStore(tmp_path / "cache", where, "model-1")
    store.save(RECORDS, VECTORS)
    said = []
    records, vectors = VectorStore(tmp_path / "cache", where, "model-1").load(said.append)
    assert list(records) == [record.name for record in RECORDS] and not said
    np.testing.assert_array_equal(vectors, VECTORS)


def test_nothing_is_left_of_the_last_one(store):
    store.save(RECORDS[:1], VECTORS[:1])
    assert len(list(store.folder.iterdir())) == 2
    assert list(store.load(print)[0]) == ["a.jpg"]
    store.save([], VECTORS[:0])
    assert store.load(print)[0] == {}


def test_models_and_collections_do_not_share(store, tmp_path):
    for other in (("/pictures", "model-2"), ("/photos", "model-1")):
        assert VectorStore(tmp_path / "cache", *other).load(print)[0] == {}
        assert VectorStore(tmp_path / "cache", *other).folder != store.folder


def test_damage_is_said_and_built_again(store):
    whole = (store.folder / NAMES).read_text()
    (vectors,) = store.folder.glob("vectors-*")
    for damage in (
        whole[: len(whole) // 2],
        whole.replace("model-1", "model-9"),
        json.dumps({**json.loads(whole), "pictures": [["a.jpg", 1]]}),
        json.dumps({**json.loads(whole), "pictures": json.loads(whole)["pictures"][:1] * 5}),
        json.dumps({**json.loads(whole), "vectors": "gone.safetensors"}),
        "[]",
        "[" * 10**6,
    ):
        (store.folder / NAMES).write_text(damage)
        said = []
        assert store.load(said.append)[0] == {} and len(said) == 1 and "built again" in said[0]
    (store.folder / NAMES).write_text(whole)
    vectors.write_bytes(vectors.read_bytes()[:50])
    said = []
    assert store.load(said.append)[0] == {} and len(said) == 1


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        VectorStore(tmp_path / "file", "/pictures", "m").save(RECORDS, VECTORS)

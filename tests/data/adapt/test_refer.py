"""RefCOCO as REFER and as ALBEF has it: the rows that come of the files, and what is dropped on the way."""

import pickle

from tests.data.adapt.files import INSTANCES, REFS, adapt, manifest, read, ref, write_json


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

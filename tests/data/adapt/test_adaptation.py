"""What holds for every format: bad input in one line, pictures from inside the folder, a folder in one piece."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.data.adapt import adaptation
from simla_ray.data.adapt import rows as rows_room
from simla_ray.data.adapt.gathered import corners, within
from simla_ray.data.adapt.reading import read_entries
from simla_ray.errors import UserError
from tests.data.adapt.files import adapt, dropped, manifest, picture, read, vqa_files, write_json, write_lines


def entries(*photos, label="neutral"):
    return [{"Flickr30K_ID": p, "pairID": f"{p}#0", "gold_label": label, "sentence2": f"a {p} ."} for p in photos]


@pytest.mark.parametrize(
    ("format", "content", "says"),
    [
        (
            "karpathy",
            '{"images": [1,]}',
            "annotations.json, line 1, column 15: not a readable JSON file (a comma before ])",
        ),
        ("karpathy", '[{"image": "a"}]', "expected an object with images"),
        (
            "karpathy",
            '{"images": [{"file_name": "a", "id": 1}]}',
            "no field filename, split, sentences; found file_name, id",
        ),
        ("karpathy", "", "line 1, column 1: not a readable JSON file"),
        ("vqav2", '{"images": []}', "expected VQAv2's object with questions, or that with annotations"),
        (
            "snli-ve",
            '{"Flickr30K_ID": "1",}\n',
            "annotations.json, line 1, column 22: not a readable JSON file (a comma before })",
        ),
        ("snli-ve", '{"id": "1"}\n', "no field Flickr30K_ID, sentence2, gold_label; found id"),
        ("snli-ve", "3\n", "line 1: expected an object, found int"),
        ("snli-ve", "\n\n", "holds no entry"),
        ("nlvr2", '[{"identifier": "a"}]', "no field sentence, label; found identifier"),
        ("nlvr2", "[1]", "entry 0: expected an object, found int"),
        ("nlvr", '\ud800{"a"}', "not readable as JSON lines"),
        ("refcoco", "[]", "neither REFER's refs or instances, nor ALBEF's list"),
        ("refcoco", json.dumps([{"ref_id": 1, "image_id": 2, "sentences": []}]), "refs without instances.json"),
        ("refcoco", '{"images": [{"file_name": 3}], "annotations": []}', "images are not objects with an id"),
        ("flickr30k-entities", "x", "no folder Sentences in"),
        (
            "entailment",
            '[{"id": 1, "label": "neutral"}]',
            "expected columns id, hypothesis (or sentence) and label; found id",
        ),
    ],
)
def test_wrong_annotations_are_one_line(format, content, says, tmp_path, images, capsys):
    file = tmp_path / "annotations.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert adapt(format, [file], images("a.jpg"), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations.json", "images"]


def test_options_are_checked(tmp_path, images, capsys):
    file, folder = write_lines(tmp_path / "a.jsonl", entries("1")), images("1.jpg")
    assert adapt("snli-ve", [tmp_path / "b.jsonl"], folder, tmp_path / "out") == 2
    assert "--annotations: " in (error := capsys.readouterr().err) and "b.jsonl does not exist" in error
    assert adapt("snli-ve", [file], tmp_path / "nowhere", tmp_path / "out") == 2
    assert "--images: " in (error := capsys.readouterr().err) and "nowhere does not exist" in error
    assert adapt("snli-ve", [file], folder, file) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert adapt("snli-ve", [file], folder, tmp_path / "out", "--restval", "keep") == 2
    assert "--restval: only with karpathy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        adapt("gqa", [file], folder, tmp_path / "out")


def test_no_picture_and_no_entry_are_errors(tmp_path, images, capsys):
    folder = images("other.jpg")
    assert adapt("snli-ve", [write_lines(tmp_path / "a.jsonl", entries("1", "2"))], folder, tmp_path / "out") == 2
    assert "--images: not one of 2 pictures can be used: 2 image_missing (first: 1, 2)" in capsys.readouterr().err
    unlabelled = write_lines(tmp_path / "b.jsonl", entries("1", "2", label="-"))
    assert adapt("snli-ve", [unlabelled], folder, tmp_path / "out") == 2
    assert "b.jsonl: no entry can be used (2 label_missing)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "images"]


def test_pictures_come_from_the_folder_only(tmp_path, images):
    folder = images("in/1.jpg", "2.jpg", "x/3.jpg", "y/3.jpg")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(9))
    (folder / "link.jpg").symlink_to(secret)
    (folder / "broken.jpg").write_bytes(picture(3)[:100])
    (folder / "page.jpg").write_bytes(b"<html>")
    names = ["/elsewhere/coco/2.jpg", "in/1.jpg", "../secret.jpg", "link.jpg", "z/3.jpg", "y/3.jpg", "gone.jpg",
             str(secret), "broken.jpg", "page.jpg", "a\0b.jpg"]  # fmt: skip
    pairs = [{"image": name, "caption": f"no. {i}"} for i, name in enumerate(names)]
    assert adapt("refcoco", [write_json(tmp_path / "pairs.json", pairs)], folder, tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    assert {uid: row["image"] for uid, row in rows.items()} == {"2": picture(1), "1": picture(0)}
    assert dropped(tmp_path / "out") == {
        ("secret", "image_outside_roots"), ("link", "image_outside_roots"), ("3", "image_ambiguous"),
        ("gone", "image_missing"), ("broken", "image_truncated"), ("page", "image_unreadable"),
        ("a\0b", "image_missing"),
    }  # fmt: skip


def test_a_finished_folder_stays_and_another_is_refused(tmp_path, images, capsys):
    file, folder, out = write_lines(tmp_path / "a.jsonl", entries("1", "2")), images("1.jpg", "2.jpg"), tmp_path / "out"
    out.mkdir()
    assert adapt("snli-ve", [file], folder, out) == 0
    before = (out / "data-00000.parquet").stat().st_mtime_ns
    assert sorted(path.name for path in out.iterdir()) == ["data-00000.parquet", "dropped.jsonl", "manifest.json"]
    assert adapt("snli-ve", [file], folder, out) == 0
    assert "finished" in capsys.readouterr().out and (out / "data-00000.parquet").stat().st_mtime_ns == before
    assert adapt("snli-ve", [file], folder, out, "--split", "dev") == 2
    assert "is not empty; give an empty or a new folder" in capsys.readouterr().err
    write_lines(file, entries("1", "2", "3"))
    assert adapt("snli-ve", [file], folder, out) == 2
    assert (out / "data-00000.parquet").stat().st_mtime_ns == before


def test_the_folder_appears_in_one_piece(tmp_path, images, monkeypatch):
    file, folder, out = write_lines(tmp_path / "a.jsonl", entries("1", "2")), images("1.jpg", "2.jpg"), tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(adaptation, "write_shard", killed)
        assert adapt("snli-ve", [file], folder, out) == 130
        assert not out.exists()
    left = tmp_path / ".out.unfinished"  # as a kill leaves it
    left.mkdir()
    (left / "data-00007.parquet").write_bytes(b"half")
    assert adapt("snli-ve", [file], folder, out) == 0
    assert len(read(out)) == 2 and not left.exists()


def test_shards_and_row_groups_are_cut_by_their_size(tmp_path, images, monkeypatch):
    names = [str(i) for i in range(7)]
    folder, file = images(*(f"{n}.jpg" for n in names)), write_lines(tmp_path / "a.jsonl", entries(*names))
    size = max(len(picture(i)) for i in range(7))
    monkeypatch.setattr(rows_room, "GROUP_BYTES", int(1.5 * size))
    monkeypatch.setattr(adaptation, "SHARD_BYTES", int(3.5 * size))
    assert adapt("snli-ve", [file], folder, tmp_path / "out") == 0
    shards = manifest(tmp_path / "out")["shards"]
    assert [(shard["file"], shard["rows"]) for shard in shards] == [
        ("data-00000.parquet", 4),
        ("data-00001.parquet", 3),
    ]
    assert pq.ParquetFile(tmp_path / "out" / "data-00000.parquet").num_row_groups == 2
    assert list(read(tmp_path / "out")) == names


def test_a_data_set_of_pictures_with_splits(tmp_path, capsys):
    rows = [{"uid": f"u{i}", "image_id": f"photo/{i}.png", "image": picture(i), "captions": ["x"],
             "split": "val" if i % 2 else "train"} for i in range(5)]  # fmt: skip
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "a.parquet", row_group_size=2)
    file = write_lines(tmp_path / "a.jsonl", entries("3", "u1", "2", "9"))
    assert adapt("snli-ve", [file], tmp_path / "set", tmp_path / "a") == 0
    found = read(tmp_path / "a")
    assert {uid: (row["image"], row["split"]) for uid, row in found.items()} == {
        "u1": (picture(1), "val"), "2": (picture(2), "train"), "3": (picture(3), "val"),
    }  # fmt: skip
    assert dropped(tmp_path / "a") == {("9", "image_missing")}
    assert adapt("snli-ve", [file], tmp_path / "set", tmp_path / "b", "--split", "val") == 0
    assert list(read(tmp_path / "b")) == ["u1", "3"] and manifest(tmp_path / "b")["rows_in"] == 3
    assert adapt("snli-ve", [write_lines(tmp_path / "c.jsonl", entries("3"))], tmp_path / "set", tmp_path / "c",
                 "--split", "test") == 2  # fmt: skip
    assert "the data set of --images has none of that split" in capsys.readouterr().err
    pair = [{"images": ["2", "3"], "sentence": "a", "label": "True"}]
    assert adapt("nlvr2", [write_json(tmp_path / "d.json", pair)], tmp_path / "set", tmp_path / "d") == 2
    assert "pairs of pictures are read from a folder" in capsys.readouterr().err


VAL = "COCO_val2014_000000000042"


@pytest.mark.parametrize(
    ("uid", "image_id"),
    [
        (VAL, None), (f"val2014/{VAL}", None), (f"/data/coco/val2014/{VAL}.jpg", None), (f"{VAL}.png", None),
        ("000000000042", None), ("shard-7", f"val2014/{VAL}.jpg"), ("shard-7", "42"), ("42", None),
    ],
)  # fmt: skip
def test_a_data_set_is_searched_without_folders_and_endings(uid, image_id, tmp_path):
    rows = [{"uid": f"other/{i}.jpg", "image": picture(i), "captions": ["x"], "image_id": None} for i in range(3)]
    rows[1] |= {"uid": uid, "image_id": image_id}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    assert adapt("vqav2", vqa_files(tmp_path), tmp_path / "set.parquet", tmp_path / "out") == 0
    (row,) = read(tmp_path / "out").values()
    assert (row["uid"], row["image_id"], row["image"]) == (VAL, "42", picture(1))


def test_pictures_that_only_folders_tell_apart_are_ambiguous(tmp_path):
    rows = [{"uid": uid, "image_id": image_id, "image": picture(i), "captions": ["x"]} for i, (uid, image_id) in
            enumerate([("a/1.jpg", None), ("b/1.jpg", None), ("2#0", "c/2.jpg"), ("2#1", "c/2.jpg"),
                       ("d/3.jpg", None), ("e/3.png", None)])]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    entries = [{"image": name, "hypothesis": "A dog .", "label": "neutral"}
               for name in ("x/1.jpg", "a/1.jpg", "x/2.jpg", "x/3.jpg", "x/3", "x/4.jpg")]  # fmt: skip
    file = write_lines(tmp_path / "a.jsonl", entries)
    assert adapt("entailment", [file], tmp_path / "set.parquet", tmp_path / "out") == 0
    assert {uid: row["image"] for uid, row in read(tmp_path / "out").items()} == {
        "a/1.jpg": picture(0), "x/2.jpg": picture(2), "x/3.jpg": picture(4),
    }  # fmt: skip
    assert dropped(tmp_path / "out") == {
        ("x/1.jpg", "image_ambiguous"), ("x/3", "image_ambiguous"), ("x/4.jpg", "image_missing"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("box", "expected", "clipped"),
    [
        ([10, 5, 40, 20], [0.1, 0.1, 0.5, 0.5], False),
        ([-10, -5, 20, 10], [0.0, 0.0, 0.1, 0.1], True),
        ([90, 40, 10.5, 10], [0.9, 0.8, 1.0, 1.0], False),
        ([0, 0, 1000, 1000], [0.0, 0.0, 1.0, 1.0], True),
        ([100, 0, 10, 10], None, False),
        ([10, 10, 0, 5], None, False),
        ([10, 10, -5, 5], None, False),
        ([float("nan"), 0, 5, 5], None, False),
        ([0, 0, float("inf"), 5], None, False),
        ([10**400, 0, 5, 5], None, False),
        ([1, 2, 3], None, False),
        (["1", 2, 3, 4], None, False),
        (None, None, False),
    ],
)
def test_boxes(box, expected, clipped):
    assert within(corners(box), (100, 50)) == (expected, clipped)


def test_lines_and_lists_are_told_by_their_content(tmp_path):
    listed = write_json(tmp_path / "a.jsonl", [{"a": 1}, {"a": 2}])
    lined = write_lines(tmp_path / "b.json", [{"a": 1}, {"a": 2}])
    (tmp_path / "c.json").write_text('\n\ufeff\n [\n{"a": 1}]'.replace("\ufeff", ""))
    assert list(read_entries(listed, ["a"])) == [("entry 0", {"a": 1}), ("entry 1", {"a": 2})]
    assert list(read_entries(lined, ["a"])) == [("line 1", {"a": 1}), ("line 2", {"a": 2})]
    assert list(read_entries(tmp_path / "c.json", ["a"])) == [("entry 0", {"a": 1})]
    with pytest.raises(UserError, match="no field b; found a"):
        list(read_entries(lined, ["b"]))

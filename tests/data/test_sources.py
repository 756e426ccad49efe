"""Files, indexes and the row: what is read, under which names, and what is refused."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.data.index import build_index
from simla_ray.data.sources import DataFile, names_of, read_column, read_rows
from simla_ray.data.sources.names import told_apart
from simla_ray.errors import UserError


def test_parquet_rows_come_back_in_the_asked_order(world_files, world_rows, world_index):
    assert len(world_index) == len(world_rows["train"])
    ordinals = np.array([40, 3, 95, 17, 2])
    got = [None] * 5
    for unit, places, where in world_index.locate(ordinals):
        for position, row in zip(where, read_rows(unit, places, None, ()), strict=True):
            got[position] = row
    for ordinal, row in zip(ordinals, got, strict=True):
        expected = world_rows["train"][ordinal]
        assert row["uid"] == expected["uid"]
        assert row["image"] == expected["image"]
        assert row["captions"] == expected["captions"]
        assert [p["text"] for p in row["phrases"]] == [p["text"] for p in expected["phrases"]]
        assert np.allclose(row["boxes"], expected["boxes"])


@pytest.mark.parametrize("width", [-1, 3])
def test_halves_come_as_numbers(tmp_path, width):
    features = np.array([[[0.1, 2, -3]], [[4, 5, 6], [7, 8, 65504]]], dtype=object)
    columns = {"image": [b"", b""], "caption": ["a", "b"]}
    half = pa.list_(pa.list_(pa.float16(), width))
    columns["region_feats"] = pa.array([list(of) for of in features], pa.list_(pa.list_(pa.float32()))).cast(half)
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    index = build_index([str(tmp_path / "rows.parquet")], None, [], "x")
    rows = read_rows(index.units[0], np.arange(2), None, ())
    assert [row["region_feats"] for row in rows] == [[[float(np.float16(0.1)), 2, -3]], [[4, 5, 6], [7, 8, 65504]]]


def test_other_names_one_caption_and_missing_uids(tmp_path):
    table = pa.table({"image": [b"a", b"b"], "caption": ["one", "two"]})
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=1)
    index = build_index([str(tmp_path / "*.parquet")], None, [], "data.train")
    (row,) = read_rows(index.units[1], np.array([0]), None, ())
    uid = f"{tmp_path.name}/pairs:1"
    assert row == {"uid": uid, "image_id": uid, "image": b"b", "captions": ["two"]}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["d/pairs.parquet"], ["d/pairs"]),
        (["d/a.tar", "e/b.tar", "d/a.parquet", "e/a.csv"], ["a", "b", "d/a", "e/a"]),
        (["x/1/0.tar", "x/2/0.tar", "x/2/1.tar"], ["1/0.tar", "2/0.tar", "1"]),
        (["1/same/name.parquet", "2/same/name.parquet"], ["1/same/name.parquet", "2/same/name.parquet"]),
        (["same/name.parquet", "2/same/name.parquet"], ["same/name.parquet", "2/same/name.parquet"]),
        (["1/b/c/0.tar", "2/b/c/0.tar", "2/b/d/0.tar"], ["1/b/c/0.tar", "2/b/c/0.tar", "2/b/d/0.tar"]),
        (["d/a.json", "d/a.csv"], ["a.json", "a.csv"]),
    ],
)
@pytest.mark.parametrize("root", ["/data/here", "/mnt/elsewhere/deep", "s3://bucket"])
def test_files_of_one_name_are_told_apart_wherever_they_lie(root, paths, names):
    files = [DataFile(f"{root}/{path}", path.rpartition(".")[2]) for path in paths]
    assert list(names_of(files).values()) == names


def test_files_on_disk_and_in_a_store_are_told_apart():
    files = ["/mnt/d/0.tar", "s3://bucket/d/0.tar?region=x"]
    assert list(told_apart(dict.fromkeys(files, "0")).values()) == ["mnt/d/0.tar", "bucket/d/0.tar"]


def shard(path, keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for ending in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))


def uids(uris):
    index = build_index([str(uri) for uri in uris], None, [], "data.train")
    return [row["uid"] for u, p, _ in index.locate(np.arange(len(index))) for row in read_rows(u, p, ("uid",), ())]


def test_uids_that_stand_in_differ_within_a_set_and_not_between_places(tmp_path):
    def make(root):
        for folder in ("1/same", "2/same"):
            shard(root / folder / "0.tar", ["a", "b"])
            pq.write_table(pa.table({"image": [b"x"] * 2, "caption": ["c"] * 2}), root / folder / "rows.parquet")
        return uids([root / "1/same", root / "2/same"])

    found = make(tmp_path / "here")
    assert found == make(tmp_path / "there" / "deep")
    assert found == [
        f"{folder}/{row}"
        for folder in ("1/same", "2/same")
        for row in ("0.tar/a", "0.tar/b", "rows.parquet:0", "rows.parquet:1")
    ]


def test_folders_of_images_are_named_only_where_their_rows_have_one_name(tmp_path):
    for path in ("cats/1.jpg", "cats/2.jpg", "dogs/2.jpg", "birds/3.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    assert uids([tmp_path / "cats", tmp_path / "birds"]) == ["1", "2", "3"]
    assert uids([tmp_path / "cats", tmp_path / "dogs"]) == ["cats/1", "cats/2", "dogs/2"]
    index = build_index([str(tmp_path / "cats"), str(tmp_path / "dogs")], None, [], "data.train")
    (row,) = read_rows(index.units[1], np.array([0]), None, ())
    assert row["image_id"] == "dogs/2.jpg" and row["image"] == tmp_path / "dogs" / "2.jpg"


def test_split_filter_keeps_dense_ordinals(tmp_path):
    table = pa.table({"image": [b""] * 6, "text": list("abcdef"), "split": ["train", "val"] * 3})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=4)
    index = build_index([str(tmp_path)], "val", [], "data.val")
    rows = [r["captions"][0] for u, p, _ in index.locate(np.arange(len(index))) for r in read_rows(u, p, None, ())]
    assert rows == ["b", "d", "f"]
    with pytest.raises(UserError, match=r"data\.val: .* holds no row with split dev"):
        build_index([str(tmp_path)], "dev", [], "data.val")


def test_json_list_reads_only_inside_the_roots(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    entries = [
        {"image": "a.jpg", "caption": "ok"},
        {"image": "../secret", "caption": ["outside"]},
        {"image": str(tmp_path / "secret"), "caption": "outside too"},
        {"image": "gone.jpg", "caption": "missing"},
        {"caption": "no image"},
        {"image": "a.jpg", "image_id": 0},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    index = build_index([str(tmp_path / "list.json")], None, [images], "data.train")
    rows = read_rows(index.units[0], np.arange(6), None, index.roots)
    assert rows[0]["image"] == images / "a.jpg"
    outside, missing = "image_outside_roots", "image_missing"
    assert [r["image"] for r in rows[1:]] == [outside, outside, missing, missing, images / "a.jpg"]
    assert rows[1]["captions"] == ["outside"]
    assert rows[0]["image_id"] == "a.jpg"
    assert read_column(index.units[0], "license") == [None] * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: str(p / "nothing.parquet"), "does not exist"),
        (lambda p: _write(p / "x.txt", b"a"), "none of .parquet, .tar, .json, .csv, .tsv, or a folder"),
        (lambda p: _write(p / "x.parquet", b"junk"), "not a readable Parquet file"),
        (lambda p: _write(p / "x.json", b"{"), "not a readable JSON file"),
        (lambda p: _write(p / "x.json", b'{"a": 1}'), "expected a list"),
        (lambda p: _write(p / "x.json", b"[]"), "holds no row"),
        (lambda p: _table(p / "x.parquet", {"caption": ["a"]}), "no column image or jpg or .*; found caption"),
        (
            lambda p: _table(p / "x.parquet", {"image": [b"a"]}),
            "no column captions or caption or text or .*; found image",
        ),
    ],
)
def test_bad_files_give_one_clear_error(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        build_index([make(tmp_path)], None, [], "data.train")


def _write(path, content):
    path.write_bytes(content)
    return str(path)


def _table(path, columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_fingerprint_follows_the_data(world_files, world_index, tmp_path):
    again = build_index([str(world_files / "train.parquet")], None, [], "data.train")
    other = build_index([str(world_files / "val.parquet")], None, [], "data.train")
    assert again.fingerprint() == world_index.fingerprint() != other.fingerprint()

"""Every format, written by somebody else's tool, reads to the same rows."""

import csv
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from simla_ray.config.load import load_run
from simla_ray.data.blocks import table_block
from simla_ray.data.decode import decode
from simla_ray.data.index import build_index
from simla_ray.data.map_functions import BlockMaker, WindowReader
from simla_ray.data.order import Position
from simla_ray.data.pipeline import order_of
from simla_ray.data.sources import read_column, read_rows
from simla_ray.data.sources.files import absolute
from simla_ray.errors import UserError

N = 7


def jpeg(seed=0, size=(40, 30)):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def expected():
    return [
        {
            "uid": f"{i:03d}",
            "image_id": f"i{i}",
            "image": jpeg(i),
            "captions": [f"a picture, no. {i}", f'"zwei" für {i}'],
            "keywords": ["red", f"n{i}"],
            "license": "CC0-1.0",
        }
        for i in range(N)
    ]


def described(row):
    return {name: value for name, value in row.items() if name != "image"}


def with_files(folder, rows):
    (folder / "pictures").mkdir()
    for row in rows:
        (folder / "pictures" / f"{row['uid']}.jpg").write_bytes(row["image"])
    return [described(row) | {"image": f"pictures/{row['uid']}.jpg"} for row in rows]


def write_webdataset(folder, rows):
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=3, verbose=0) as sink:
        for row in rows:
            sink.write({"__key__": row["uid"], "jpg": row["image"], "json": described(row), "cls": 3})
    return folder


def write_pandas(folder, rows):
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet", row_group_size=3)
    return folder


def write_hugging_face(folder, rows):
    features = [row | {"image": {"bytes": row["image"], "path": "elsewhere.jpg"}} for row in rows]
    pd.DataFrame(features).to_parquet(folder / "rows.parquet")
    return folder


def write_json(folder, rows):
    (folder / "list.json").write_text(json.dumps(with_files(folder, rows)))
    return folder / "list.json"


def write_csv(folder, rows, delimiter=",", name="list.csv"):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["uid", "filepath", "title", "image_id", "keywords", "license"])
        for row in with_files(folder, rows):
            lists = [json.dumps(row[name]) for name in ("captions", "keywords")]
            writer.writerow([row["uid"], row["image"], lists[0], row["image_id"], lists[1], row["license"]])
    return folder / name


def write_tsv(folder, rows):
    return write_csv(folder, rows, "\t", "list.tsv")


def write_tabs_named_csv(folder, rows):
    return write_csv(folder, rows, "\t")


def write_folder(folder, rows):
    for row in rows:
        (folder / f"{row['uid']}.jpg").write_bytes(row["image"])
        (folder / f"{row['uid']}.json").write_text(json.dumps(described(row)))
    return folder


WRITERS = {name.removeprefix("write_"): make for name, make in list(globals().items()) if name.startswith("write_")}


def read(uri, roots=()):
    index = build_index([str(uri)], None, roots, "data.train")
    rows = [None] * len(index)
    for unit, places, where in index.locate(np.arange(len(index))):
        for position, row in zip(where, read_rows(unit, places, None, index.roots), strict=True):
            rows[position] = row
    return rows


def with_bytes(row):
    return row | {"image": row["image"] if isinstance(row["image"], bytes) else row["image"].read_bytes()}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_to_the_same_rows(name, expected, tmp_path):
    rows = read(WRITERS[name](tmp_path, expected))
    assert [with_bytes(row) for row in rows] == expected


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_is_named_where_no_ending_tells_it(name, expected, tmp_path):
    """Files without an ending, alone, in a folder of their own, and by a pattern."""
    written = WRITERS[name](tmp_path, expected)
    if name == "folder":
        assert [with_bytes(row) for row in read(f"folder:{tmp_path}")] == expected
        return
    format = {"webdataset": "tar", "pandas": "parquet", "hugging_face": "parquet", "tabs_named_csv": "csv"}.get(
        name, name
    )
    renamed = tmp_path / "dump"
    renamed.mkdir()
    for file in sorted(written.iterdir()) if written.is_dir() else [written]:
        if file.is_file():
            file.rename(renamed / f"part-{file.stem}")
    if (tmp_path / "pictures").exists():
        (tmp_path / "pictures").rename(renamed / "pictures")
    (renamed / "_SUCCESS").touch()
    (renamed / ".hidden").write_text("no rows")
    for uri in (f"{format}:{renamed}", f"{format}:{renamed}/part-*"):
        assert [with_bytes(row) for row in read(uri)] == expected
    with pytest.raises(UserError, match=r"part-.* is none of \.parquet.*named, as in parquet:"):
        read(next(renamed.glob("part-*")))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("xml:dump", "data.train: xml:dump: xml is no format; allowed: parquet, tar, json, coco, csv, tsv, folder"),
        ("tar:gone", "data.train: tar:gone does not exist or holds no such file"),
        ("folder:list.txt", "data.train: folder:list.txt does not exist or holds no such file"),
        ("coco:list.txt", "list.txt: expected COCO captions"),
        ("tar:list.txt", "list.txt: not a readable tar"),
        ("parquet:list.txt", "list.txt: not a readable Parquet file"),
    ],
)
def test_what_is_not_of_the_named_format_is_one_error(uri, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text('[{"image": "a.jpg", "caption": "b"}]')
    assert len(read("json:list.txt")) == 1
    with pytest.raises(UserError) as error:
        read(uri)
    assert message in str(error.value)


def test_a_path_with_a_colon_and_a_uri_with_a_format_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pandas(tmp_path, [{"image": b"x", "caption": "c"}]).joinpath("rows.parquet").rename(tmp_path / "a:b.parquet")
    assert len(read("./a:b.parquet")) == len(read(tmp_path / "a:b.parquet")) == 1
    assert absolute("./a:b.parquet") == f"{tmp_path}/a:b.parquet"
    assert absolute("tar:shards/*") == f"tar:{tmp_path}/shards/*"
    assert absolute("tar:s3://bucket/shards?region=x") == "tar:s3://bucket/shards?region=x"


def test_a_part_of_a_unit_in_any_order(expected, tmp_path):
    (index,) = [build_index([str(write_webdataset(tmp_path, expected))], None, (), "data.train")]
    assert [len(unit) for unit in index.units] == [3, 3, 1]
    assert [row["uid"] for row in read_rows(index.units[1], np.array([2, 0]), None, ())] == ["005", "003"]
    assert read_column(index.units[0], "license") == ["CC0-1.0"] * 3


def test_coco_is_a_row_per_image(tmp_path):
    (tmp_path / "train").mkdir()
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "license": 1 + i % 2, "height": 4} for i in (9, 4, 6)]
    for image in images[:2]:
        (tmp_path / "train" / image["file_name"]).write_bytes(jpeg(image["id"]))
    captions = [(4, "four"), (9, "nine"), (4, "vier"), (6, "six")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)]
    licenses = [{"id": 1, "name": "BY"}, {"id": 2, "name": "BY-SA"}]
    content = {"info": {}, "images": images, "annotations": annotations, "licenses": licenses}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    rows = read(tmp_path / "captions.json", [tmp_path / "train"])
    assert read(f"coco:{tmp_path / 'captions.json'}", [tmp_path / "train"]) == rows
    assert [row["uid"] for row in rows] == [row["image_id"] for row in rows] == ["9", "4", "6"]
    assert [row["captions"] for row in rows] == [["nine"], ["four", "vier"], ["six"]]
    assert [row["license"] for row in rows] == ["BY-SA", "BY", "BY"]
    assert rows[0]["image"].read_bytes() == jpeg(9) and rows[2]["image"] == "image_missing"

    content["annotations"] = [{"image_id": 4, "bbox": [0, 0, 1, 1]}]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="annotations without image_id and caption"):
        read(tmp_path / "instances.json")


def test_a_folder_of_images_with_texts(tmp_path):
    (tmp_path / "cats").mkdir()
    for name in ("b.png", "cats/a.jpg", "cats/lonely.JPEG"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "b.txt").write_text("one line\n\nanother\n", encoding="utf-8-sig")
    (tmp_path / "cats" / "a.json").write_text('["from a list"]')
    (tmp_path / "cats" / "nobody.txt").write_text("a caption without an image")
    (tmp_path / ".hidden.jpg").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    rows = {row["uid"]: row for row in read(tmp_path, [tmp_path / "elsewhere"])}  # roots are for lists
    assert rows["b"]["image"] == tmp_path / "b.png"
    assert list(rows) == ["b", "cats/a", "cats/lonely", "cats/nobody"]
    assert rows["b"]["captions"] == ["one line", "another"] and rows["cats/a"]["captions"] == ["from a list"]
    assert rows["cats/lonely"]["captions"] == [] and rows["cats/nobody"]["image"] == "image_missing"


def test_flickrs_pipes_and_a_split_column(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    lines = ["image_name| comment_number| comment| split", "a.jpg| 0| A man , outside .| train", "a.jpg| 1| Two| val"]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    index = build_index([str(tmp_path / "results.csv")], "val", (), "data.val")
    (row,) = read_rows(index.units[0], np.arange(1), None, ())
    assert row["captions"] == ["Two"] and row["image_id"] == "a.jpg" and row["image"] == tmp_path / "a.jpg"


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg())
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    (row,) = read(folder)
    assert row["image"] == "caption_outside_roots" and row["captions"] == []


# --- what is bad is named, and costs a row ----------------------------------------------------------------------------


def test_bad_descriptions_cost_their_row_only(tmp_path):
    names = ("good", "latin", "comma", "number", "deep")
    for name in names:
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "comma.json").write_text('{"caption": "a",}')
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    reasons = {row["uid"]: row["image"] for row in read(tmp_path)}
    assert reasons["good"] == tmp_path / "good.jpg" and reasons["latin"] == "caption_not_utf8"
    assert {reasons[name] for name in ("comma", "number", "deep")} == {"caption_unreadable"}

    (tmp_path / "list.csv").write_bytes("filepath,caption\ngood.jpg,für\ngood.jpg,ok\nä.jpg,no\n".encode("latin-1"))
    rows = read(tmp_path / "list.csv")
    assert [row["image"] for row in rows] == ["caption_not_utf8", tmp_path / "good.jpg", "image_missing"]
    (tmp_path / "list.json").write_text('[{"image": "good.jpg", "caption": "\\ud83d", "id": "\\udc00"}]')
    rows += read(tmp_path / "list.json")
    assert rows[-1]["image"] == "caption_not_utf8"
    for row in rows:  # whatever is written of them later
        json.dumps(row["captions"], ensure_ascii=False).encode()
        (row["uid"] + row["image_id"]).encode()


def shard(path, n=5):
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            for ending, content in (("jpg", jpeg(i)), ("txt", f"no. {i}".encode())):
                member = tarfile.TarInfo(f"deep/{'n' * 120}{i}.{ending}")  # longer than a plain header takes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.mark.parametrize("part", [0.99, 0.75, 0.5, 0.3])
def test_a_tar_that_is_cut_loses_its_last_sample_and_says_so(part, tmp_path):
    path = tmp_path / "a.tar"
    whole = shard(path)
    assert all(isinstance(row["image"], bytes) for row in read(path))
    used = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: int(used * part)])
    *others, last = read(path)
    assert last["image"] == "tar_truncated"
    assert [decode(row["image"], 10**6).size for row in others] == [(40, 30)] * len(others)
    assert [row["captions"] for row in others] == [[f"no. {i}"] for i in range(len(others))]
    assert len(others) == {0.99: 4, 0.75: 3, 0.5: 2, 0.3: 1}[part]


def test_a_tar_with_a_pickle_executes_nothing_and_needs_none(tmp_path):
    ran = tmp_path / "ran"
    payload = f"cpathlib\nPath\n(S'{ran}'\ntR.".encode() + b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("a.jpg", jpeg()), ("a.pyd", payload), ("a.pickle", payload), ("a.txt", b"words")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (row,) = read(tmp_path / "a.tar")
    assert row["captions"] == ["words"] and row["image"] == jpeg() and row["uid"] == "a/a"
    assert not ran.exists()


def test_tars_that_are_none_or_hold_no_image(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(UserError, match=r"a\.tar: not a readable tar"):
        read(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match=r"b\.tar: no image in this tar"):
        read(tmp_path / "b.tar")
    shard(tmp_path / "c.tar")
    with pytest.raises(UserError, match=r"data\.train_split: train, but .*c\.tar is a tar and has no split column"):
        build_index([str(tmp_path / "c.tar")], "train", (), "data.train")


def test_formats_mix_in_one_set_and_bad_rows_are_named(expected, vocabulary, tmp_path):
    run = load_run(overrides=["batch.micro=4", "batch.global=8"])
    for name in ("webdataset", "csv", "folder"):
        (tmp_path / name).mkdir()
        uids = [row | {"uid": f"{name}-{row['uid']}"} for row in expected]
        WRITERS[name](tmp_path / name, uids)
    (tmp_path / "folder" / "folder-003.json").write_text("{")
    (tmp_path / "csv" / "pictures" / "csv-001.jpg").write_bytes(b"<html>")
    uris = [str(tmp_path / name) for name in ("webdataset", "csv/list.csv", "folder")]
    index = build_index(uris, None, [], "data.train")
    order = replace(order_of(run, index), lanes=1)
    window = next(order.windows(0, Position(), {}))
    encoded = pa.concat_tables(WindowReader(index, order).read([window]))
    (block,) = map(table_block, BlockMaker(run, vocabulary)(encoded))
    assert sorted(block["uid"]) == sorted(
        f"{name}-{i:03d}" for name in ("webdataset", "csv", "folder") for i in range(N)
    )
    dropped = {uid: reason for uid, reason in zip(block["uid"], block["drop"], strict=True) if reason}
    assert dropped == {"folder-003": "caption_unreadable", "csv-001": "image_unreadable"}
    assert block["image"].shape == (3 * N, 3, 48, 48)

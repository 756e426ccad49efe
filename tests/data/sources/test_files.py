"""Shards in a store: listed, read and indexed as on disk; what fails is asked again, then said."""

import socket

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from moto.server import ThreadedMotoServer
from pyarrow import fs

from simla_ray.data.index import build_index
from simla_ray.data.sources import files, parquet, read_rows
from simla_ray.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A server on loopback with a bucket of shards; gives the options of a URI."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        rows = [{"uid": f"p{shard}{i}", "image": b"x", "captions": [f"no. {i}"]} for i in range(5)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{shard}.parquet", row_group_size=2)
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=3, verbose=0) as sink:
        for i in range(7):
            sink.write({"__key__": f"t{i}", "jpg": bytes([i]) * 3000, "txt": f"no. {i}"})
    (folder / "list.json").write_text("[]")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="pairs")
    for path in folder.iterdir():
        client.upload_file(str(path), "pairs", f"shards/{path.name}")
        if path.suffix == ".tar":
            client.upload_file(str(path), "pairs", f"plain/{path.stem}")
    client.put_object(Bucket="pairs", Key="plain/_SUCCESS", Body=b"")
    yield f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


def rows_of(index):
    found = []
    for unit, places, _ in index.locate(np.arange(len(index))):
        found += read_rows(unit, places, None, ())
    return found


def test_parquet_and_tars_in_a_store_read_as_on_disk(store):
    index = build_index(
        [f"s3://pairs/shards/part-*.parquet{store}", f"s3://pairs/shards/0001.tar{store}"], None, (), "d"
    )
    assert index.per_uri == (6, 1) and len(index) == 13
    rows = rows_of(index)
    uids = [f"p{shard}{i}" for shard in range(2) for i in range(5)] + [f"0001/t{i}" for i in (3, 4, 5)]
    assert [row["uid"] for row in rows] == uids
    assert rows[-1]["image"] == bytes([5]) * 3000 and rows[0]["captions"] == ["no. 0"]
    assert index.fingerprint() == build_index([u for u in index_uris(store)], None, (), "d").fingerprint()


def index_uris(store):
    return [f"s3://pairs/shards/part-{i}.parquet{store}" for i in range(2)] + [f"s3://pairs/shards/0001.tar{store}"]


def test_shards_without_an_ending_in_a_store_are_read_by_the_named_format(store):
    index = build_index([f"tar:s3://pairs/plain{store}"], None, (), "data.train")
    assert [row["uid"] for row in rows_of(index)] == [f"000{i // 3}/t{i}" for i in range(7)]
    with pytest.raises(UserError, match=r"s3://pairs/plain.* holds no file of .*named, as in parquet:s3://pairs/plain"):
        build_index([f"s3://pairs/plain{store}"], None, (), "data.train")
    with pytest.raises(UserError, match=r"plain/0000.* is a list, whose images are files"):
        build_index([f"csv:s3://pairs/plain{store}"], None, (), "data.train")


def test_a_folder_of_a_store_and_what_is_not_read_from_one(store):
    assert len(files.listed(f"s3://pairs/shards{store}")) == 6
    with pytest.raises(
        UserError, match=r"data\.train: s3://pairs/shards/list\.json.* is a list, whose images are files"
    ):
        build_index([f"s3://pairs/shards{store}"], None, (), "data.train")
    with pytest.raises(UserError, match=r"data\.train: s3://pairs/none\.parquet.* does not exist"):
        build_index([f"s3://pairs/none.parquet{store}"], None, (), "data.train")


def test_a_store_that_is_not_there_is_one_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    with pytest.raises(UserError, match=r"s3://pairs/a\.parquet.*cannot be listed"):
        build_index([f"s3://pairs/a.parquet{options}"], None, (), "data.train")


@pytest.fixture
def slow_down(monkeypatch):
    """A store that fails as often as one asks it to, and no waiting."""
    failures = {"left": 0, "asked": 0}

    class Failing(fs.LocalFileSystem):
        def open_input_file(self, path):
            failures["asked"] += 1
            if failures["left"]:
                failures["left"] -= 1
                raise OSError("AWS Error SLOW_DOWN: Please reduce your request rate.\nmore")
            return super().open_input_file(path)

    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(files, "_located", lambda uri: (Failing(), uri.removeprefix("s3://")))
    return failures


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_failing_reads_are_tried_again_and_then_reported(name, slow_down, tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "caption": ["c"]}), tmp_path / "a.parquet")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        sink.write({"__key__": "k", "jpg": b"x", "txt": "c"})
    uri = f"s3://{tmp_path}/{name}"
    slow_down["left"] = 2
    (row,) = rows_of(build_index([uri], None, (), "d"))
    assert row["image"] == b"x" and slow_down["left"] == 0
    index = build_index([uri], None, (), "d")
    slow_down["left"] = 100
    parquet._open.cache_clear()
    with pytest.raises(UserError, match=r"a\.\w+: cannot be read after 4 attempts \(AWS Error SLOW_DOWN"):
        rows_of(index)
    assert slow_down["left"] == 96


def test_a_store_that_fails_costs_no_row_and_damage_does(slow_down, tmp_path, monkeypatch):
    table = pa.table({"image": [bytes([i]) * 100 for i in range(4)], "caption": ["c"] * 4})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    index = build_index([f"s3://{tmp_path}/a.parquet"], None, (), "d")
    whole, broken = pq.ParquetFile.read_row_group, []

    def breaking(self, number, *args, **options):
        if number not in broken:
            broken.append(number)
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject: curlCode: 56")
        return whole(self, number, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", breaking)
    assert [row["image"] for row in rows_of(index)] == [bytes([i]) * 100 for i in range(4)]
    broken.clear()
    slow_down["left"] = 100
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read after 4 attempts \(AWS Error SLOW_DOWN"):
        rows_of(index)
    slow_down["left"] = 0
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:12] = bytes(byte ^ 0xFF for byte in content[4:12])
    (tmp_path / "a.parquet").write_bytes(content)
    assert [row["image"] for row in rows_of(index)] == ["row_group_unreadable"] * 2 + [bytes([i]) * 100 for i in (2, 3)]

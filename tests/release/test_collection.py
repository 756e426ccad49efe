"""What pictures there are: below a folder, in Parquet files, in tars."""

import io
import os
import tarfile

import pytest
from PIL import Image
from pyarrow import fs

from simla_ray.data.decode import decode
from simla_ray.data.sources import files
from simla_ray.errors import UserError
from simla_ray.release.collection import Folder, Rows, open_collection, printable


def png(shade):
    out = io.BytesIO()
    Image.new("L", (8, 8), shade).save(out, "PNG")
    return out.getvalue()


def shade(encoded):
    return decode(encoded, 10**6).getpixel((0, 0))[0]


def test_files_below_a_folder(tmp_path):
    for name in ("b.PNG", "a/z.jpeg", "a/b/c.png", ".hidden.png", ".git/d.png", "notes.txt", "a/list.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(7))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    found = open_collection(tmp_path)
    assert isinstance(found, Folder)
    assert [entry.name for entry in found.entries] == ["b.PNG", "a/z.jpeg", "a/b/c.png"]
    assert all(entry.size == len(png(7)) and entry.mtime_ns > 0 for entry in found.entries)
    assert list(found.read([2, 0])) == [(2, "a/b/c.png", tmp_path / "a/b/c.png"), (0, "b.PNG", tmp_path / "b.PNG")]


def test_rows_of_parquet(world_files, world_rows):
    found = open_collection(world_files / "test.parquet")
    assert isinstance(found, Rows) and len(found.entries) == 48
    assert found.entries[17].name == "test.parquet:17" and found.file("test.parquet:17") is None
    wanted = [0, 15, 16, 40]  # over several row groups
    read = list(found.read(wanted))
    assert [(place, uid) for place, uid, _ in read] == [(i, world_rows["test"][i]["uid"]) for i in wanted]
    assert [image for _, _, image in read] == [world_rows["test"][i]["image"] for i in wanted]


def test_a_folder_of_data_files_is_their_rows(world_files):
    found = open_collection(str(world_files))
    assert isinstance(found, Rows) and len(found.entries) == 96 + 48 + 48
    assert len({entry.name for entry in found.entries}) == len(found.entries)


def test_rows_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for i in range(300):  # more than a unit
            info = tarfile.TarInfo(f"{i:03d}.png")
            content = png(i % 250)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = open_collection(tmp_path / "some.tar")
    read = list(found.read([3, 255, 256, 299]))
    assert [place for place, _, _ in read] == [3, 255, 256, 299]
    assert [shade(image) for _, _, image in read] == [3, 5, 6, 49]


def test_rows_in_a_store_are_known_by_size_and_time(tmp_path, world_files, monkeypatch):
    (tmp_path / "bucket").mkdir()
    path = tmp_path / "bucket" / "test.parquet"
    path.write_bytes((world_files / "test.parquet").read_bytes())
    system = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_system", lambda *_: system)
    before = open_collection("s3://bucket/test.parquet").entries
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))  # written again, of the same size
    after = open_collection("s3://bucket/test.parquet").entries
    assert [entry.name for entry in after] == [entry.name for entry in before]
    assert {(entry.size, entry.mtime_ns) for entry in after} == {(path.stat().st_size, 1_700_000_000_123_456_789)}
    assert all(entry.mtime_ns > 1_700_000_000_123_456_789 for entry in before)


def test_what_holds_no_pictures_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text('[{"image": "a.png", "caption": "a"}]')
    for source, message in (
        (tmp_path / "nowhere", "pictures: .*nowhere does not exist"),
        (tmp_path / "empty", "empty does not exist or holds no file"),
        (tmp_path / "list.json", r"list\.json: a list of pictures; give their folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_collection(source)
        assert "\n" not in str(error.value)


def test_files_of_one_name_would_be_mixed_up(tmp_path, world_files):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        os.link(world_files / "test.parquet", tmp_path / folder / "test.parquet")
    with pytest.raises(UserError, match="files of one name in several folders"):
        open_collection(str(tmp_path / "*" / "test.parquet"))


def test_names_are_printable():
    name = os.fsdecode(b"a\xff\n\x1b[2Jb.jpg")
    assert printable(name) == "a???[2Jb.jpg"
    printable(name).encode()
    assert printable("Füße 1 & 2.jpg") == "Füße 1 & 2.jpg"

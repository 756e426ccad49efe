"""Any source to shards and back, what is dropped on the way, kills, and what a check finds."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from simla_ray.data.convert.command import main
from simla_ray.data.convert.look import look, near
from simla_ray.data.convert.plan import STATE
from simla_ray.data.convert.statistics import bins, quantile
from simla_ray.data.convert.survey import as_digests, rows_between
from simla_ray.data.decode import decode
from simla_ray.data.index import build_index

ROOT = Path(__file__).parents[2]
MAX_PIXELS = 10**6


def picture(seed=0, size=(40, 30), kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def make_rows(n, first=0, size=(40, 30)):
    return [
        {"uid": f"u{i:03d}", "image": picture(i, size), "captions": [f"picture {i}", f"zwei für {i}"], "license": "CC0"}
        for i in range(first, first + n)
    ]


def write_parquet(folder, rows, name="rows.parquet", group=7):
    pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=group)
    return folder / name


def write_tars(folder, rows):
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=5, verbose=0) as sink:
        for row in rows:
            sink.write({"__key__": row["uid"], "jpg": row["image"], "json": {k: row[k] for k in row if k != "image"}})
    return folder


def write_csv(folder, rows):
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["uid", "filepath", "captions", "license"])
        for row in rows:
            (folder / f"{row['uid']}.jpg").write_bytes(row["image"])
            writer.writerow([row["uid"], f"{row['uid']}.jpg", json.dumps(row["captions"]), row["license"]])
    return folder / "list.csv"


def write_folder(folder, rows):
    for row in rows:
        (folder / f"{row['uid']}.jpg").write_bytes(row["image"])
        (folder / f"{row['uid']}.txt").write_text("\n".join(row["captions"]), encoding="utf-8")
    return folder


def read(uri):
    index = build_index([str(uri)], None, [], "data.train")
    return [row for _, row in rows_between(index, 0, len(index))]


def convert(uri, to, *options):
    return main([str(uri), "--to", str(to), "--tasks", "2", *options])


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def pixels(image):
    return np.asarray(decode(image, MAX_PIXELS))


@pytest.mark.ray
def test_questions_statements_and_pairs_are_converted(ray_session, tmp_path):
    qas = [{"question": "what is it?", "answers": ["a dog", "dog"], "type": "other"}]
    rows = [{"uid": f"u{i}", "images": [picture(i), picture(i + 9)], "qas": qas, "sentence": f"no. {i}", "label": i > 1}
            for i in range(4)]  # fmt: skip
    rows.append(rows[0] | {"uid": "u4", "images": [picture(4), b"<html>"]})
    assert convert(write_parquet(tmp_path, rows), tmp_path / "out", "--max-px", "20") == 0
    assert manifest(tmp_path / "out")["dropped"] == {"image_unreadable": 1}
    before, after = read(tmp_path / "rows.parquet")[:4], read(tmp_path / "out")
    for was, now in zip(before, after, strict=True):
        assert {k: v for k, v in now.items() if "image" not in k} == {k: v for k, v in was.items() if "image" not in k}
        assert now["statements"] == [{"text": was["captions"][1], "label": str(was["uid"] > "u1").lower()}]
        assert [decode(image, MAX_PIXELS).size for image in now["images"]] == [(20, 15)] * 2


@pytest.mark.ray
@pytest.mark.parametrize("write", [write_parquet, write_tars, write_csv, write_folder])
def test_every_source_reads_back_to_the_same_rows(ray_session, tmp_path, write):
    rows, source = make_rows(12), tmp_path / "source"
    source.mkdir()
    assert convert(write(source, rows), tmp_path / "out") == 0
    before, after = read(source), read(tmp_path / "out")
    assert [row["uid"] for row in after] == [row["uid"] for row in rows]
    for was, row, now in zip(before, rows, after, strict=True):
        assert now == was | {"image": row["image"]}
        assert (pixels(now["image"]) == pixels(row["image"])).all()
    found = manifest(tmp_path / "out")
    assert found["rows"] == found["rows_in"] == 12
    assert found["licenses"] == ({"not stated": 12} if write is write_folder else {"CC0": 12})
    assert found["fingerprint"] == build_index([str(tmp_path / "out")], None, [], "x").fingerprint()
    assert not (tmp_path / "out" / STATE).exists()
    expected = {"uid", "image", "captions"} | (set() if write is write_folder else {"license"})
    assert set(found["columns"]) - {"image_id"} == expected


@pytest.fixture
def mixed(tmp_path):
    """Two good rows of every three problems there are, in two row groups."""
    rows = make_rows(10)
    rows[1]["image"] = b"not an image"
    rows[3]["captions"] = ["...", ""]
    rows[6]["uid"] = "u002"
    rows[7]["image"] = None
    rows[8]["image"] = picture(8, (2000, 1000))
    (tmp_path / "source").mkdir()
    return write_parquet(tmp_path / "source", rows, group=4)


MIXED = {
    ("u001", "image_unreadable", 1), ("u003", "caption_empty", 3), ("u002", "uid_duplicate", 6),
    ("u007", "image_missing", 7), ("u008", "image_too_large", 8),
}  # fmt: skip


@pytest.mark.ray
def test_dropped_rows_are_counted_and_named(ray_session, mixed, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(mixed, out, "--max-pixels", str(MAX_PIXELS)) == 0
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {(line["uid"], line["reason"], line["row"]) for line in lines} == MIXED
    assert {line["file"] for line in lines} == {str(mixed)}
    assert manifest(out)["dropped"] == dict(Counter(reason for _, reason, _ in MIXED))
    assert [row["uid"] for row in read(out)] == ["u000", "u002", "u004", "u005", "u009"]
    printed = capsys.readouterr().out
    assert "uid_duplicate" in printed and "rows out" in printed
    # The same command again touches nothing; another one is refused, and says why.
    was = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert convert(mixed, out, "--max-pixels", str(MAX_PIXELS)) == 0
    assert "finished" in capsys.readouterr().out
    assert convert(mixed, out, "--max-pixels", str(MAX_PIXELS), "--max-px", "20") == 2
    assert "--max-px not given, now it is 20" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == was


@pytest.mark.ray
def test_no_row_of_shards_of_one_name_is_taken_for_a_repeat(ray_session, tmp_path):
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        with webdataset.TarWriter(str(tmp_path / folder / "0000.tar")) as sink:
            for i, row in enumerate(make_rows(3)):
                sink.write({"__key__": str(i), "jpg": row["image"], "txt": "a caption"})
    uris = [str(tmp_path / folder / "0000.tar") for folder in ("left", "right")]
    assert main([*uris, "--to", str(tmp_path / "out"), "--tasks", "2"]) == 0
    assert manifest(tmp_path / "out")["dropped"] == {}
    expected = [f"{folder}/0000.tar/{i}" for folder in ("left", "right") for i in range(3)]
    assert [row["uid"] for row in read(tmp_path / "out")] == expected


@pytest.mark.ray
def test_resize_reencodes_only_what_is_too_large(ray_session, tmp_path):
    rows = make_rows(2, size=(40, 30)) + make_rows(1, 2, (100, 50)) + make_rows(1, 3)
    rows[3]["image"] = picture(3, (50, 100), "PNG")
    (tmp_path / "source").mkdir()
    assert convert(write_parquet(tmp_path / "source", rows), tmp_path / "out", "--max-px", "60") == 0
    after = read(tmp_path / "out")
    assert [row["image"] for row in after[:2]] == [row["image"] for row in rows[:2]]
    opened = [Image.open(io.BytesIO(row["image"])) for row in after[2:]]
    assert [(image.format, image.size) for image in opened] == [("JPEG", (60, 30)), ("PNG", (30, 60))]


@pytest.mark.ray
def test_split_empty_shards_and_nothing_usable(ray_session, tmp_path, capsys):
    rows = [row | {"split": "val" if i % 3 == 0 else "train"} for i, row in enumerate(make_rows(9, size=(640, 480)))]
    (tmp_path / "source").mkdir()
    source = write_parquet(tmp_path / "source", rows)
    assert convert(source, tmp_path / "out", "--split", "val") == 0
    assert [p.name for p in sorted((tmp_path / "out").glob("*.parquet"))] == ["val-00000-of-00001.parquet"]
    assert [row["uid"] for row in read(tmp_path / "out")] == ["u000", "u003", "u006"]
    empty = pa.schema(pq.read_schema(tmp_path / "out" / "val-00000-of-00001.parquet")).empty_table()
    pq.write_table(empty, tmp_path / "out" / "val-00001-of-00002.parquet")
    assert len(read(tmp_path / "out")) == 3
    assert convert(source, tmp_path / "none", "--max-pixels", "1024") == 2
    assert "not one row could be used" in capsys.readouterr().err


@pytest.mark.ray
def test_a_killed_conversion_goes_on(ray_session, tmp_path):
    """SIGKILL of the process between two shards, then the same command."""
    (tmp_path / "source").mkdir()
    rng = np.random.default_rng(0)
    rows = make_rows(60)
    for row in rows:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (500, 500, 3), dtype=np.uint8)).save(buffer, "PNG")
        row["image"] = buffer.getvalue()  # 0.75 MB that take a while
    source, out = write_parquet(tmp_path / "source", rows), tmp_path / "out"
    options = ["--shard-mb", "4", "--row-group-mb", "1", "--max-px", "490"]
    environment = os.environ | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    module = [sys.executable, "-m", "simla_ray.data.convert", str(source), "--to", str(out), "--tasks", "1", *options]
    driver = subprocess.Popen(
        module, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and driver.poll() is None and len(list(out.glob(f"{STATE}/*.json"))) < 4:
        time.sleep(0.01)  # the plan and three shards
    assert driver.poll() is None, "it ended before it could be killed"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (out / "manifest.json").exists()
    time.sleep(1)  # what the dead driver's task was writing
    reports = [p.name.removesuffix(".json") for p in (out / STATE).glob("data-*.json")]
    was = {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in reports}
    assert main([*module[3:-6], "--tasks", "1", *options, "--max-pixels", "1025"]) == 2  # another plan: refused
    ended = subprocess.run(module, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "resumed" in ended.stdout
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in reports} == was
    assert not list(out.glob(".*"))
    assert main([str(source), "--to", str(tmp_path / "whole"), "--tasks", "2", *options]) == 0
    assert manifest(out)["shards"] == manifest(tmp_path / "whole")["shards"]
    assert len(manifest(out)["shards"]) > len(reports) >= 3


@pytest.mark.ray
def test_check_names_rows_and_pictures_in_both_sets(ray_session, mixed, tmp_path, capsys):
    rows = make_rows(3, 100)
    with Image.open(io.BytesIO(picture(4))) as decoded:  # u004's pixels in another file format
        buffer = io.BytesIO()
        decoded.save(buffer, "PNG")
    rows[1]["image"] = buffer.getvalue()
    rows[2]["image"] = picture(5, (80, 60))  # u005 at another size
    rows[0]["uid"] = "u009"
    rows[0]["captions"] = ["<script>alert(1)</script> & <b>bold</b>"]
    val, page = write_parquet(tmp_path, rows, "val.parquet"), tmp_path / "page.html"
    limit = ["--tasks", "2", "--max-pixels", str(MAX_PIXELS), "--page", str(page)]
    assert main(["--check", str(mixed), "--val", str(val), *limit]) == 1
    printed = capsys.readouterr().out
    for uid, reason, row in MIXED:
        line = next(line for line in printed.splitlines() if line.startswith(reason))
        assert f"{uid} (rows.parquet {row})" in line
    assert "u002 (rows.parquet 6) = u002 (rows.parquet 2)" in printed
    both = next(line for line in printed.splitlines() if line.startswith("picture_in_both"))
    assert "u004 (rows.parquet 4) = u101 (val.parquet 1)" in both and both.split()[3] == "1"
    assert "u005 (rows.parquet 5) = u102 (val.parquet 2)" in printed
    uids = next(line for line in printed.splitlines() if line.startswith("(uid in both)"))
    assert "u009 (rows.parquet 9) = u009 (val.parquet 0)" in uids and uids.split()[5] == "1"
    text = page.read_text()
    assert "with the uid of one of the training set: 1." in text
    assert "<script" not in text and "<b>bold" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold" in text
    assert "http" not in text.replace("http-equiv", "")
    assert main(["--check", str(val), *limit]) == 0
    assert "no finding" in capsys.readouterr().out


@pytest.mark.ray
def test_check_compares_no_uids_that_are_made_up(ray_session, tmp_path, capsys):
    """Shards of training and validation often have one name and keys from zero on."""
    for first, folder in enumerate(("train", "val")):
        (tmp_path / folder).mkdir()
        with webdataset.TarWriter(str(tmp_path / folder / "0000.tar")) as sink:
            for i, row in enumerate(make_rows(3, 3 * first)):
                sink.write({"__key__": str(i), "jpg": row["image"], "txt": "a caption"})
    page = ["--tasks", "2", "--page", str(tmp_path / "page.html")]
    assert main(["--check", str(tmp_path / "train"), "--val", str(tmp_path / "val"), *page]) == 0
    assert "uid in both" not in capsys.readouterr().out


@pytest.mark.ray
def test_a_damaged_row_group_is_named_row_by_row(ray_session, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    source = write_parquet(tmp_path / "source", make_rows(9), group=3)
    content = bytearray(source.read_bytes())
    column = pq.ParquetFile(source).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 16] = bytes(byte ^ 0xFF for byte in content[start : start + 16])
    source.write_bytes(content)
    assert convert(source, tmp_path / "out") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(line["uid"], line["reason"], line["row"]) for line in lines] == [
        (f"u00{i}", "row_group_unreadable", i) for i in (3, 4, 5)
    ]
    assert [row["uid"] for row in read(tmp_path / "out")] == [f"u00{i}" for i in (0, 1, 2, 6, 7, 8)]
    assert main(["--check", str(source), "--tasks", "2", "--page", str(tmp_path / "page.html")]) == 1
    assert "u003 (rows.parquet 3)" in capsys.readouterr().out


@pytest.mark.ray
def test_malformed_columns_of_a_stranger_are_dropped_by_name(ray_session, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    found = [{"phrases": [3]}, {"boxes": "all"}, {"keywords": "\ud800dog"}, {"boxes": [[0, 0, 1, 1]]}]
    for i, more in enumerate(found):
        (tmp_path / "source" / f"{i}.jpg").write_bytes(picture(i))
        (tmp_path / "source" / f"{i}.json").write_text(json.dumps({"captions": "a dog"} | more))
    assert convert(tmp_path / "source", tmp_path / "out") == 0
    reasons = ("phrases_unreadable", "boxes_unreadable", "keywords_unreadable")
    assert manifest(tmp_path / "out")["dropped"] == dict.fromkeys(reasons, 1)
    (after,) = read(tmp_path / "out")
    assert after["boxes"] == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.parquet", "--to", "out"], "gone.parquet does not exist"),
        (["rows.parquet"], "--to: not given"),
        (["rows.parquet", "--to", "s3://bucket/x"], "--to: s3://bucket/x is in a store"),
        (["rows.parquet", "--to", "rows.parquet"], "--to: rows.parquet is a file"),
        (["rows.parquet", "--to", "."], "holds what is converted"),
        (["rows.parquet", "--to", "full"], "is not empty (other.txt)"),
        (["rows.parquet", "--to", "out", "--split", "val"], "--split: val, but"),
        (["rows.parquet", "--to", "out", "--shard-mb", "0"], "--shard-mb: 0, must be at least 1"),
        (["rows.parquet", "--to", "out", "--image-root", "nowhere"], "--image-root: nowhere is no folder"),
        (["rows.parquet", "--to", "out", "--page", "x.html"], "--page: only with --check"),
        (["--check", "rows.parquet", "--max-px", "9"], "--max-px: only with --to"),
        (["--check", "rows.parquet", "--val-split", "val"], "no --val is given"),
        (["--check", "rows.parquet", "--page", "no/x.html"], "--page: no is no folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path, make_rows(2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("x")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_near_finds_what_brute_force_finds():
    rng = np.random.default_rng(0)
    ours = rng.integers(0, 256, (300, 16), dtype=np.uint8)
    theirs = ours[:60].copy()
    for row in theirs:  # up to nine bits away
        for bit in rng.choice(128, rng.integers(0, 10), replace=False):
            row[bit // 8] ^= 1 << (bit % 8)
    distance = np.bitwise_count(ours[:, None] ^ theirs[None]).sum(axis=2)
    found = near(as_digests(ours.tobytes()), as_digests(theirs.tobytes()))
    assert found.tolist() == np.argwhere(distance <= 7).tolist()
    assert len(found) > 20
    plain = as_digests(look(Image.new("RGB", (64, 64))))
    assert len(near(plain, plain)) == 0


def test_bins_add_up():
    counts = Counter({1: 5, 2: 3, 7: 1, 400: 1})
    found = bins(counts)
    assert sum(n for _, _, n in found) == 10 and len(found) <= 24
    assert found[0][0] <= 1 and found[-1][1] >= 400
    assert quantile(counts, 0.5) == 1 and quantile(counts, 0.8) == 2

"""Bad data through a real file: each kind is counted under a reason of its own, and what is only odd is used."""

import io
import json
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simla_ray.config.load import load_run
from simla_ray.data.blocks import table_block
from simla_ray.data.decode import DropRow, EncodedImage, decode
from simla_ray.data.index import build_index
from simla_ray.data.map_functions import BlockMaker, WindowReader
from simla_ray.data.order import Position
from simla_ray.data.packing import pack
from simla_ray.data.pipeline import order_of
from simla_ray.data.sample import SampleMaker
from simla_ray.data.schema import TRAINING
from simla_ray.data.sources import parquet, read_column, read_pieces, read_rows, read_words
from simla_ray.data.text import clean
from simla_ray.errors import UserError

WHITE = [255, 255, 255]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode="RGB", size=(40, 30)):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(0).integers(0, 255, (*size[::-1], *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def bomb(width, height):
    """A PNG whose header promises what is not there."""
    content = encoded(Image.new("L", (8, 8)))
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def palette(**options):
    """Left half red, right half blue."""
    image = Image.new("P", (40, 30))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (20, 0, 40, 30))
    return encoded(image, **options)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(), "JPEG", exif=exif)


def frames():
    return encoded(Image.new("P", (40, 30)), "GIF", save_all=True, append_images=[noise("L")] * 3)


JPEG = encoded(noise(), "JPEG")
PNG = encoded(noise())
GREY_16 = Image.fromarray((np.arange(1200) * 50).astype(np.uint16).reshape(30, 40))
#: Kind -> (columns, reason); an empty reason: the row is used.
ROWS = {
    "good": ({}, ""),
    "truncated JPEG": ({"image": JPEG[: len(JPEG) // 2]}, "image_truncated"),
    "truncated PNG": ({"image": PNG[: len(PNG) // 2]}, "image_truncated"),
    "truncated WebP": ({"image": encoded(noise(), "WEBP")[:-50]}, "image_truncated"),
    "damaged PNG": ({"image": PNG[:60] + bytes(50) + PNG[110:]}, "image_damaged"),
    "zero bytes": ({"image": b""}, "image_empty"),
    "null": ({"image": None}, "image_missing"),
    "HTML": ({"image": b"<!DOCTYPE html><html><body>404</body></html>"}, "image_unreadable"),
    "1x1": ({"image": encoded(Image.new("RGB", (1, 1)), "GIF")}, "image_too_small"),
    "spacer": ({"image": encoded(Image.new("RGB", (300, 1)))}, "image_too_small"),
    "100 megapixels": ({"image": bomb(10_000, 10_000)}, "image_too_large"),
    "200 megapixels": ({"image": bomb(20_000, 10_000)}, "image_too_large"),
    "floats": ({"image": encoded(Image.new("F", (40, 30)), "TIFF")}, "image_depth_unknown"),
    "no caption": ({"captions": []}, "caption_empty"),
    "null captions": ({"captions": None}, "caption_empty"),
    "null caption": ({"captions": [None]}, "caption_empty"),
    "empty caption": ({"captions": [""]}, "caption_empty"),
    "blank caption": ({"captions": [" \t\n", "\u00a0", "?!"]}, "caption_empty"),
    "invisible caption": ({"captions": ["\u200b\u0000"]}, "caption_empty"),
    "not UTF-8": ({"captions": ["für".encode("latin-1")]}, "caption_not_utf8"),
    "animated GIF": ({"image": frames()}, ""),
    "CMYK": ({"image": encoded(noise("CMYK"), "JPEG")}, ""),
    "16 bits": ({"image": encoded(GREY_16)}, ""),
    "palette with alpha": ({"image": palette(transparency=bytes([0, 255]))}, ""),
    "EXIF rotation": ({"image": turned()}, ""),
    "10,000 words": ({"captions": ["a red ring " * 3334]}, ""),
    "one caption of three": ({"captions": ["", None, "a red ring"]}, ""),
}


def read(path, roots=()):
    index = build_index([str(path)], None, roots, "data.train")
    return [row for unit, places, _ in index.locate(np.arange(len(index))) for row in read_rows(unit, places, None, ())]


def reasons(rows, vocabulary, training=True):
    make, found = SampleMaker(load_run(), vocabulary, training=training), {}
    for row in rows:
        try:
            sample = make(row, 0)
            assert sample["image"].shape == (3, 48, 48) and sample["n_tokens"] > 1
            found[row["uid"]] = ""
        except DropRow as drop:
            found[row["uid"]] = drop.reason
    return found


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_has_its_reason_and_none_is_fatal(training, vocabulary, tmp_path):
    good = {"image": JPEG, "captions": ["a red ring"]}
    rows = [{"uid": kind, **good, **columns} for kind, (columns, _) in ROWS.items()]
    for row in rows:  # bytes: Parquet takes them for text without a look, as other writers do
        row["captions"] = row["captions"] and [c.encode() if isinstance(c, str) else c for c in row["captions"]]
    binary = pa.schema([("uid", pa.string()), ("image", pa.binary()), ("captions", pa.list_(pa.binary()))])
    table = pa.Table.from_pylist(rows, binary)
    pq.write_table(_as_text(table), tmp_path / "rows.parquet", row_group_size=7)
    found = reasons(read(tmp_path / "rows.parquet"), vocabulary, training)
    assert found == {kind: reason for kind, (_, reason) in ROWS.items()}
    assert Counter(found.values())["image_truncated"] == 3


def _as_text(table):
    """The captions called text without a check, valid or not."""
    captions = table["captions"].combine_chunks()
    values = captions.values
    text = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    lists = pa.ListArray.from_arrays(captions.offsets, text, mask=captions.is_null())
    return table.set_column(table.column_names.index("captions"), "captions", lists)


def test_files_of_a_list_have_reasons_too(vocabulary, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    files = {"good.jpg": JPEG, "html.jpg": b"<html></html>", "empty.jpg": b"", "cut.jpg": JPEG[:400]}
    for name, content in files.items():
        (pictures / name).write_bytes(content)
    (pictures / "folder.jpg").mkdir()
    (pictures / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (pictures / "circle.jpg").symlink_to(pictures / "circle.jpg")
    expected = {
        "good.jpg": "",
        "html.jpg": "image_unreadable",
        "empty.jpg": "image_empty",
        "cut.jpg": "image_truncated",
        "gone.jpg": "image_missing",
        "folder.jpg": "image_missing",
        "circle.jpg": "image_missing",
        "out.jpg": "image_outside_roots",
        "../secret.jpg": "image_outside_roots",
        str(tmp_path / "secret.jpg"): "image_outside_roots",
        "/etc/hostname": "image_outside_roots",
    }
    entries = [{"uid": name, "image": name, "caption": "a red ring"} for name in expected]
    entries.append({"uid": "structure", "image": "good.jpg", "caption": {"raw": "a red ring"}})
    (pictures / "list.json").write_text(json.dumps(entries))
    assert reasons(read(pictures / "list.json"), vocabulary) == expected | {"structure": "caption_not_text"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a.jpg", "caption": "b"},\n]', r"list\.json, line 2, column 1: .*a comma before \]"),
        ('[\n{"image": "a.jpg", "caption": "b",}]', r"list\.json, line 2, column 35: .*a comma before \}"),
        ('[\n{"image": "a.jpg" "caption": "b"}]', r"list\.json, line 2, column 19: not a readable JSON file \(Exp"),
        ('{"images": [1]}', r"list\.json: images is not a list of objects"),
        ('{"images": [], "annotations": {"image_id": 1}}', r"list\.json: annotations is not a list of objects"),
    ],
)
def test_a_broken_list_is_one_error_that_says_where(content, message, tmp_path):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.jpg"], "captions": [["a"]]}, r"column image is string; allowed: binary"),
        ({"jpg": [1.5], "captions": [["a"]]}, r"column jpg is double; allowed: binary"),
        ({"image": [b"a"], "text": [{"raw": "a"}]}, r"column text is struct<raw: string>; allowed: text, or a list"),
    ],
)
def test_a_column_of_another_type_is_one_error(columns, message, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.parquet")


def test_parquet_of_views_is_read(tmp_path):
    captions = pa.array(["a", None, "für"], pa.string_view())
    pq.write_table(pa.table({"image": [JPEG] * 3, "captions": captions}), tmp_path / "a.parquet")
    index = build_index([str(tmp_path / "a.parquet")], None, (), "data.train")
    rows = read_rows(index.units[0], np.array([2, 1]), None, ())
    assert [row["captions"] for row in rows] == [["für"], []]


def flipped(path, group, column, at=0, n=16):
    """The file with bytes of one column of a row group flipped, from a part of its pages on."""
    metadata = pq.ParquetFile(path).metadata.row_group(group)
    (chunk,) = (c for c in map(metadata.column, range(metadata.num_columns)) if c.path_in_schema.startswith(column))
    start = (chunk.dictionary_page_offset or chunk.data_page_offset) + int(at * chunk.total_compressed_size)
    content = bytearray(path.read_bytes())
    content[start : start + n] = bytes(byte ^ 0xFF for byte in content[start : start + n])
    path.write_bytes(content)


LOST = "row_group_unreadable"


@pytest.fixture
def pairs(tmp_path):
    """Four row groups of five rows."""
    table = {"uid": [f"u{i:02d}" for i in range(20)], "image": [JPEG] * 20, "caption": ["a red ring"] * 20}
    pq.write_table(pa.table(table | {"license": ["CC0"] * 20}), tmp_path / "a.parquet", row_group_size=5)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("column", ["image", "caption", "uid", "license"])
def test_a_damaged_row_group_costs_its_rows_and_names_them(column, pairs, vocabulary):
    flipped(pairs, 2, column)
    found = reasons(read(pairs), vocabulary)
    folder = pairs.parent.name
    names = [f"{folder}/a:{i}" if column == "uid" else f"u{i}" for i in range(10, 15)]
    assert list(found)[10:15] == names and len(found) == 20
    assert {uid for uid, reason in found.items() if reason} == set(names)
    assert {found[name] for name in names} == {LOST}
    index = build_index([str(pairs)], None, (), "data.train")
    training = read_rows(index.units[2], np.array([3, 1]), TRAINING, ())
    assert [row["image"] == LOST for row in training] == [column != "license"] * 2
    assert [row["uid"] for row in training] == [names[3], names[1]]
    assert [uid for uid, _ in read_words(index.units[2], ())] == names
    assert read_column(index.units[2], "license") == ([] if column == "license" else ["CC0"] * 5)


def test_a_row_group_read_in_pieces_keeps_what_is_before_the_damage(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    image = [rng.integers(0, 256, 3000, dtype=np.uint8).tobytes() for _ in range(20)]
    table = pa.table({"image": image, "caption": ["a red ring"] * 20})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20, data_page_size=5000, write_batch_size=1,
                   use_dictionary=False)  # fmt: skip
    flipped(tmp_path / "a.parquet", 0, "image", at=0.5, n=8000)
    monkeypatch.setattr(parquet, "PIECE_ROWS", 4)
    index = build_index([str(tmp_path / "a.parquet")], None, (), "data.train")
    pieces = list(read_pieces(index.units[0], np.arange(1, 20), None, ()))
    assert [int(place) for places, _ in pieces for place in places] == list(range(1, 20))
    found = [row for _, rows in pieces for row in rows]
    kept = sum(row["image"] != LOST for row in found)
    assert 4 <= kept < 12 and [row["image"] for row in found] == image[1 : kept + 1] + [LOST] * (19 - kept)
    assert {row["image"] for row in read(tmp_path / "a.parquet")} == {LOST}


def test_a_count_that_the_footer_does_not_tell_is_damage(pairs, monkeypatch):
    index = build_index([str(pairs)], None, (), "data.train")
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *args, **options: whole(*args, **options)[:-1])
    assert [row["image"] for row in read_rows(index.units[1], np.arange(5), None, ())] == [LOST] * 5


def test_damage_stops_a_run_only_past_the_allowed_fraction(pairs, vocabulary):
    run = load_run(overrides=["batch.micro=2", "batch.global=4", "data.max_drop_fraction=0.25"])
    index = build_index([str(pairs)], None, (), "data.train")

    order = order_of(run, index)

    def epoch():
        windows = [next(order.windows(lane, Position(), {})) for lane in (0, 1)]
        for encoded in WindowReader(index, order).read(windows):
            yield from map(table_block, BlockMaker(run, vocabulary)(encoded))

    flipped(pairs, 1, "image")
    rows = [row for block in epoch() for row in zip(block["uid"], block["drop"], strict=True)]
    assert sorted(rows) == [(f"u{i:02d}", LOST if 5 <= i < 10 else "") for i in range(20)]
    packs = list(pack(epoch(), [0, 1], run, len(index)))
    assert {drop.reason for packed in packs for drop in packed.dropped} == {LOST}
    flipped(pairs, 2, "caption")
    with pytest.raises(UserError, match=r"max_drop_fraction: 6 of 20 .*row_group_unreadable 6; first u"):
        list(pack(epoch(), [0, 1], run, len(index)))


def test_where_the_split_column_is_damaged_nobody_knows_the_split(tmp_path):
    table = {"image": [JPEG] * 10, "caption": ["a"] * 10, "split": ["train", "val"] * 5}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=5)
    flipped(tmp_path / "a.parquet", 1, "split")
    with pytest.raises(
        UserError, match=r"data\.train_split: the split column of .*a\.parquet is damaged in row group 1"
    ):
        build_index([str(tmp_path / "a.parquet")], "train", (), "data.train")


def shard(path, change=None, pax=None):
    """Three samples; ``change(header)`` edits the header of the second one's image, and its checksum is made to fit."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            for ending, content in (("jpg", JPEG), ("txt", b"a red ring")):
                member = tarfile.TarInfo(f"s{i}.{ending}")
                member.size = len(content)
                member.pax_headers = pax if pax and (i, ending) == (1, "jpg") else {}
                tar.addfile(member, io.BytesIO(content))
    if change:
        content = bytearray(path.read_bytes())
        start = content.index(b"s1.jpg")
        header = content[start : start + 512]
        change(header)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[start : start + 512] = header
        path.write_bytes(content)
    return path


def field(at, value):
    def change(header):
        header[at : at + len(value)] = value

    return change


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("change", "pax"),
    [
        (field(124, b"\xff" * 10 + b"\xf0\0"), None),  # of negative size: the next member would be an earlier one
        (field(124, b"\x80" + b"\x7f" * 11), None),  # larger than any file
        (field(124, b"77777777777\0"), None),
        (field(156, b"L"), None),  # a name in the room of a picture
        (field(156, b"S"), None),
        (None, {"size": "-4096"}),
        (None, {"GNU.sparse.size": str(2**40), "GNU.sparse.map": f"0,1,{2**40 - 1},1"}),  # a terabyte of zeros
    ],
)
def test_lying_tar_headers_cost_what_follows_them_at_most(change, pax, vocabulary, tmp_path):
    found = reasons(read(shard(tmp_path / "a.tar", change, pax)), vocabulary)
    first, *others = found.items()
    assert first[0] == "a/s0" and first[1] in ("", "tar_truncated")
    assert not others or {reason for _, reason in others} != {""}


def test_a_tar_with_a_name_that_is_not_utf8_is_read(vocabulary, tmp_path):
    assert reasons(read(shard(tmp_path / "a.tar", field(0, b"\xff"))), vocabulary) == dict.fromkeys(
        ("a/s0", "a/?1", "a/s1", "a/s2"), ""
    ) | {"a/?1": "caption_empty", "a/s1": "image_missing"}


def test_other_columns_cost_a_row_only_where_they_are_wanted(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    columns = {
        "phrases": ["text", [1], [{"text": "a", "boxes": [[0, 0, 1]]}]],
        "boxes": [[[0, 0, 1, "x"]], 3],
        "keywords": ["red", [1]],
        "box_labels": [{}],
    }
    rows = [(name, value) for name, values in columns.items() for value in values]
    entries = [{"image": "a.jpg", "caption": "a", **dict.fromkeys(columns), name: value} for name, value in rows]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    found = read(tmp_path / "list.json")
    assert [row["image"] for row in found] == [f"{name}_unreadable" for name, _ in rows]
    index = build_index([str(tmp_path / "list.json")], None, (), "data.train")
    training = read_rows(index.units[0], np.arange(len(rows)), ("uid", "image", "captions"), ())
    assert {row["image"] for row in training} == {tmp_path / "a.jpg"}


def test_transparent_pixels_are_white_and_opaque_ones_as_they_were():
    def pixels(content):
        return np.asarray(decode(content, 10**6))

    halves = pixels(palette(transparency=bytes([0, 255])))
    assert (halves[:, :20] == WHITE).all() and (halves[:, 20:] == [0, 0, 255]).all()
    assert (pixels(palette(transparency=1))[:, 20:] == WHITE).all()
    for kind in ("PNG", "WEBP", "TIFF"):
        image = noise("RGBA")
        image.putalpha(255)
        content = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert np.array_equal(pixels(content), np.asarray(image.convert("RGB")))
        image.putalpha(0)
        assert (pixels(encoded(image, kind)) == WHITE).all()
    image = Image.new("LA", (40, 30), (0, 128))
    assert (pixels(encoded(image)) == 127).all()


def test_grey_of_16_bits_is_scaled():
    for kind in ("PNG", "TIFF"):
        grey = np.asarray(decode(encoded(GREY_16, kind), 10**6))
        assert np.array_equal(grey[..., 0], np.asarray(GREY_16) >> 8)
    clear = np.asarray(decode(encoded(GREY_16, transparency=50 * 41), 10**6))
    assert clear[1, 1].tolist() == WHITE and clear[1, 2].tolist() != WHITE


def test_the_first_frame_is_used_and_cmyk_keeps_its_colours():
    assert not np.asarray(decode(frames(), 10**6)).any()
    red = decode(encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG", quality=95), 10**6)
    assert red.getpixel((5, 5))[0] > 240 and max(red.getpixel((5, 5))[1:]) < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_is_that_of_the_upright_picture(kind):
    exif = Image.Exif()
    exif[0x0112] = 8
    opened = EncodedImage(encoded(noise(), kind, exif=exif), 10**6)
    assert opened.size == opened.rgb().size == (30, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_costs_nothing():
    content = encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert decode(content, 10**6).size == (40, 30)


def test_captions_of_any_length_take_a_moment(vocabulary):
    """A million letters without a space are one word of a million pieces to a vocabulary."""
    for caption in ("字红" * 500_000, "a" * 2_000_000, "a\u0301" * 500_000):
        cut = clean(caption, 30)
        assert len(cut) == 1000
        assert len(vocabulary.encode(cut, 25).ids) <= 25
    assert vocabulary.encode("a red ring " * 30, 25).truncated

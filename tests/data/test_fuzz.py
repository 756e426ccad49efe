"""What strangers may have written, mutated: rows, reasons or one clear error come of it, in a moment."""

import io
import itertools
import json
import re
import tarfile
import time
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from simla_ray.config.load import load_run
from simla_ray.data.decode import DropRow, EncodedImage
from simla_ray.data.index import build_index
from simla_ray.data.sample import SampleMaker
from simla_ray.data.schema import normalise
from simla_ray.data.sources import read_column, read_rows
from simla_ray.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("seconds", [1, pytest.param(6, marks=pytest.mark.slow)]),
]
REASONS = "(images?|caption|keywords|phrases|boxes|box_labels|qas|statements|tar|row_group)_[a-z0-9_]+"
#: An example that takes longer hangs; a busy machine has its share in it.
DEADLINE = timedelta(seconds=20)


def fuzz(seconds, check, strategy):
    """Examples until the time is over, in rounds with seeds 0, 1, ...: a failure names its example."""
    end = time.monotonic() + seconds
    for number in itertools.count():
        once = settings(max_examples=50, deadline=DEADLINE, database=None, suppress_health_check=list(HealthCheck))
        seed(number)(once(given(strategy)(check)))()
        if time.monotonic() > end:
            return


def mutated(originals):
    """Bytes of one of them with a few bytes changed, inserted, repeated or cut off."""
    edits = st.tuples(
        st.sampled_from(("set", "insert", "zero", "repeat", "cut")), st.floats(0, 1), st.binary(max_size=6)
    )

    def apply(original, several):
        content = original
        for kind, part, new in several:
            at = int(part * len(content))
            if kind == "cut":
                content = content[:at]
            elif kind == "zero":
                content = content[:at] + bytes(40) + content[at + 40 :]
            elif kind == "repeat":
                content = content[:at] + content[at // 2 :]
            else:
                content = content[:at] + new + content[at + (len(new) if kind == "set" else 0) :]
        return content

    return st.builds(apply, st.sampled_from(originals), st.lists(edits, min_size=1, max_size=5))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures():
    values = np.random.default_rng(0).integers(0, 255, (24, 30, 4), dtype=np.uint8)
    rgba = Image.fromarray(values)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [
        *(encoded(rgb, "JPEG", **o) for o in ({}, {"progressive": True}, {"exif": exif}, {"restart_marker_rows": 1})),
        encoded(rgb.resize((150, 120)), "JPEG"),
        encoded(rgba.convert("CMYK"), "JPEG"),
        encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
        *(encoded(rgba.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        encoded(grey, "PNG", transparency=7, exif=exif),
        encoded(rgb.quantize(16), "PNG", transparency=bytes(range(16))),
        encoded(Image.fromarray(values[..., 0].astype(np.uint16) << 7), "PNG", transparency=9),
        encoded(grey, "GIF", save_all=True, append_images=[rgb.convert("P")] * 2, transparency=3),
        encoded(rgba, "WEBP", lossless=True, exif=exif),
        encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        *(encoded(rgba.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(encoded(rgb, "TIFF", compression=c) for c in (None, "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")),
        encoded(rgba.convert("1"), "TIFF", compression="group4"),
        *(encoded(rgba.convert(mode), "TIFF", exif=exif) for mode in ("LA", "CMYK", "YCbCr", "LAB", "I", "F")),
    ]
    return made


PICTURES = pictures()
LETTERS = st.text(st.characters(exclude_categories=()), max_size=12)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=8), LETTERS,
    st.builds(lambda text, n: text * n, LETTERS, st.sampled_from((1, 100, 20_000))),
    st.sampled_from(["a red ring", "left", "\0", "[PAD] [CLS]", "<person>", "\ud83d", "\u200b", "NaN", "{}", "["]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(LETTERS, inner, max_size=3))
)


@pytest.fixture(scope="module")
def use(vocabulary):
    """Makes a sample of a row, or drops it for a reason that is a word of ours."""
    overrides = ["data.augment=full", "data.crop_scale_min=0.2", "data.max_pixels=1000000"]
    makers = [SampleMaker(load_run(overrides=overrides), vocabulary, training=training) for training in (True, False)]

    def one(row):
        (row["uid"] + row["image_id"] + "".join(row["captions"])).encode()
        for make in makers:
            try:
                assert make(row, 0)["image"].shape == (3, 48, 48)
            except DropRow as drop:
                assert re.fullmatch(REASONS, drop.reason)

    return one


@pytest.fixture
def read(use, tmp_path):
    """Reads and uses all rows of a file of this content; an error of the user's is fine."""
    numbers = itertools.count()

    def all_of(content, ending):
        path = tmp_path / f"{next(numbers)}.{ending}"  # readers remember files by name
        path.write_bytes(content)
        try:
            index = build_index([str(path)], None, (), "data.train")
            for unit, places, _ in index.locate(np.arange(len(index))):
                for columns in (None, ("uid", "image", "captions", "image_id")):
                    for row in read_rows(unit, places, columns, ()):
                        use(row)
                read_column(unit, "license")
        except UserError as error:
            assert str(path) in str(error)
        finally:
            path.unlink()

    return all_of


def test_pictures(seconds):
    def check(example):
        content, reduction = example
        try:
            whole = EncodedImage(content, 10**6)
            image, boxes = whole.reduced(reduction, [(0.0, 0.0, *map(float, whole.size))])
            assert image.mode == "RGB" and image.resize((9, 9), Image.Resampling.BICUBIC, box=boxes[0])
            assert reduction > 1 or image.size == whole.size
        except DropRow as drop:
            assert drop.reason.startswith("image_")

    fuzz(seconds, check, st.tuples(mutated(PICTURES), st.sampled_from((1, 2, 4, 8))))


def test_rows(seconds, use):
    names = (
        "uid", "image_id", "captions", "keywords", "phrases", "boxes", "box_labels", "qas", "statements", "images",
        "sentence", "label",
    )  # fmt: skip
    entry = st.dictionaries(st.sampled_from(["question", "answers", "type", "text", "label", "bytes"]), ANYTHING)
    columns = {name: st.one_of(ANYTHING, st.lists(entry, max_size=3)) for name in names}
    images = st.sampled_from([PICTURES[0], PICTURES[4], b"", None, {"bytes": PICTURES[8]}, {"path": "/etc/hostname"}])
    fuzz(seconds, lambda row: use(normalise(row, "file:0")), st.fixed_dictionaries({"image": images}, optional=columns))


def test_parquet(seconds, read):
    kinds = [
        pa.binary(), pa.string(), pa.large_string(), pa.binary(3), pa.string_view(), pa.int64(), pa.float32(),
        pa.null(), pa.bool_(), pa.date32(), pa.decimal128(9, 2), pa.dictionary(pa.int8(), pa.string()),
        pa.list_(pa.string()), pa.list_(pa.list_(pa.string())), pa.list_(pa.binary()), pa.list_(pa.int8(), 2),
        pa.large_list(pa.string()),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.struct([("bytes", pa.string())]),
        pa.struct([]), pa.map_(pa.string(), pa.int8()), pa.list_(pa.struct([("raw", pa.string())])),
    ]  # fmt: skip
    values = st.one_of(
        st.none(), st.just(3), st.just(b"abc"), st.just(PICTURES[0]), st.just("a red ring"), st.just(["a", None]),
        st.just({"bytes": PICTURES[0], "path": "/etc/hostname"}), st.just([1, 2]), st.just([[b"\xff"]]), SCALARS,
    )  # fmt: skip
    column = st.tuples(st.sampled_from(kinds), st.lists(values, min_size=2, max_size=2))

    def table(columns):
        arrays = {}
        for name, (kind, values) in columns.items():
            try:
                arrays[name] = pa.array(values, kind)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):  # not of this type
                arrays[name] = pa.nulls(2, kind)
        if "not_text" in arrays:  # bytes that are called text
            raw = arrays.pop("not_text").cast(pa.binary()) if arrays["not_text"].type == pa.binary() else None
            if raw is not None:
                arrays["captions"] = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
        buffer = io.BytesIO()
        try:
            pq.write_table(pa.table(arrays), buffer)
        except pa.ArrowException:  # not for Parquet
            return b""
        return buffer.getvalue()

    names = {name: column for name in ("image", "captions")}
    others = {name: column for name in ("uid", "image_id", "caption", "phrases", "license", "not_text")}
    tables = st.builds(table, st.fixed_dictionaries(names, optional=others))
    good = table({"image": (pa.binary(), PICTURES[:2]), "captions": (pa.string(), ["a", "b"])})
    fuzz(seconds, lambda content: read(content, "parquet"), st.one_of(tables, mutated([good])))


def shard(form, long=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for i in range(3):
            described = json.dumps(
                {"captions": ["a red ring"], "license": "CC0", "phrases": [{"text": "a", "boxes": []}]}
            )
            for ending, content in (("jpg", PICTURES[i]), ("json", described.encode()), ("pickle", b"cos\nsystem\n.")):
                member = tarfile.TarInfo(f"{long}{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()[: -10240 + 1024] if form != tarfile.USTAR_FORMAT else buffer.getvalue()


def test_tars(seconds, read):
    shards = [shard(tarfile.USTAR_FORMAT), shard(tarfile.GNU_FORMAT, "n" * 120), shard(tarfile.PAX_FORMAT, "ü" * 120)]

    def in_headers(content, edits):
        """Headers are where a reader can go wrong: their checksum is made to fit again."""
        content = bytearray(content)
        for number, at, new in edits:
            start = min(number * 512, len(content) // 512 * 512 - 512)
            content[start + at : start + at + len(new)] = new
            header = content[start : start + 148] + b" " * 8 + content[start + 156 : start + 512]
            content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        return bytes(content)

    places = st.one_of(st.sampled_from((0, 100, 124, 156, 257, 345, 482)), st.integers(0, 500))
    news = st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\1", b"\x80\x7f" + b"\xff" * 10, b"S", b"L", b"x", b"g", b"K"]
        ),
    )
    edits = st.lists(st.tuples(st.integers(0, 20), places, news), min_size=1, max_size=4)
    headers = st.builds(in_headers, st.sampled_from(shards), edits)
    fuzz(seconds, lambda content: read(content, "tar"), st.one_of(mutated(shards), headers))


def test_json(seconds, read, tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    entries = [
        {"image": "a.jpg", "caption": "a red ring", "id": 1},
        {"image": "../x", "caption": ["a"], "image_id": "\0"},
    ]
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg", "license": 1}],
        "annotations": [{"image_id": 1, "caption": "a red ring"}],
        "licenses": [{"id": 1, "name": "BY"}],
    }
    keys = st.sampled_from([
        "image", "caption", "captions", "uid", "image_id", "phrases", "boxes", "split", "license", "images", "qas",
        "sentence", "label",
    ])  # fmt: skip
    paths = st.sampled_from(["a.jpg", "/etc/hostname", "../a.jpg", "a" * 5000, "\0", "\udc00", ".", ""])
    lists = st.lists(st.dictionaries(keys, st.one_of(paths, ANYTHING), max_size=9), max_size=3)
    inner = st.lists(
        st.dictionaries(st.sampled_from(["id", "file_name", "license", "image_id", "caption", "name"]), ANYTHING),
        max_size=3,
    )
    cocos = st.fixed_dictionaries(
        {"images": st.one_of(inner, ANYTHING)},
        optional={"annotations": st.one_of(inner, ANYTHING), "licenses": st.one_of(inner, ANYTHING)},
    )

    def as_json(value):
        return json.dumps(value, default=lambda b: b.decode("latin-1")).encode()

    originals = [as_json(entries), as_json(coco), b"[" * 3000, b'[{"image": "a.jpg", "caption": %s}]' % (b"[" * 900)]
    contents = st.one_of(mutated(originals), st.builds(as_json, st.one_of(lists, cocos, ANYTHING)))
    fuzz(seconds, lambda content: read(content, "json"), contents)


def test_tables(seconds, read, tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    originals = [
        b'image,caption,id,keywords\na.jpg,"a red, round ring",1,"[""red""]"\n/etc/hostname,"[""a"", null]",2,red\n',
        b"image\tcaption\tlicense\na.jpg\ta ring\tBY\n",
        b"image_name| comment_number| comment\na.jpg| 0| A ring .\n",
        "image,caption\na.jpg,für\n".encode("latin-1"),
        "image,caption\na.jpg,für\n".encode("utf-16"),
        b"image,caption,boxes\na.jpg,[[[[[[,[[0;0;1;1]]\n" + b'a.jpg,"' + b"[" * 20_000,
    ]
    fuzz(
        seconds,
        lambda example: read(*example),
        st.tuples(mutated(originals), st.sampled_from(("csv", "tsv"))),
    )


def test_folders(seconds, use, tmp_path):
    numbers = itertools.count()
    beside = [b"a red ring\nanother\n", b'{"captions": ["a ring"], "uid": 1, "boxes": [[0, 0, 1, 1]]}', b'["a ring"]']

    def check(example):
        image, described, ending = example
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        (folder / "a.jpg").write_bytes(image)
        (folder / f"a.{ending}").write_bytes(described)
        index = build_index([str(folder)], None, (), "data.train")
        for row in read_rows(index.units[0], np.arange(len(index)), None, ()):
            use(row)

    fuzz(seconds, check, st.tuples(mutated(PICTURES[:3]), mutated(beside), st.sampled_from(("txt", "json"))))

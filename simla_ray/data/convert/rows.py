"""A row as it was read -> the row as it is written, or the reason why it is not."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from simla_ray.data.decode import FORMATS, DropRow, decode
from simla_ray.data.schema import OPTIONAL, utf8
from simla_ray.data.text import clean

#: Formats that lose nothing; a resized picture of theirs is written as PNG, any other as JPEG.
LOSSLESS = ("PNG", "GIF", "BMP")
JPEG_QUALITY = 90

_STRINGS = pa.list_(pa.string())
_BOXES = pa.list_(pa.list_(pa.float64()))
#: Of every column that a row may have; numbers of boxes as JSON has them.
TYPES: dict[str, pa.DataType] = {
    "uid": pa.string(),
    "image": pa.binary(),
    "captions": _STRINGS,
    "image_id": pa.string(),
    "keywords": _STRINGS,
    "phrases": pa.list_(pa.struct([("text", pa.string()), ("boxes", _BOXES)])),
    "boxes": _BOXES,
    "box_labels": _STRINGS,
    "qas": pa.list_(pa.struct([("question", pa.string()), ("answers", _STRINGS), ("type", pa.string())])),
    "statements": pa.list_(pa.struct([("text", pa.string()), ("label", pa.string())])),
    "images": pa.list_(pa.binary()),
    "split": pa.string(),
    "source": pa.string(),
    "license": pa.string(),
    "scene": pa.string(),
    "claims": _STRINGS,
    "region_feats": pa.list_(pa.list_(pa.float32())),
    "tags": _STRINGS,
}
assert set(TYPES) == {"uid", "image", "captions", *OPTIONAL}


@dataclass(frozen=True)
class Picture:
    """A usable picture: its bytes, the name of their format, and what they show."""

    encoded: bytes
    format: str
    image: Image.Image


def present(row: Mapping[str, Any]) -> list[str]:
    """The optional columns that a row has. An ``image_id`` that only repeats the uid is none."""
    return [
        name for name in OPTIONAL if row.get(name) is not None and not (name == "image_id" and row[name] == row["uid"])
    ]


def schema_of(columns: Collection[str], others: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """Columns of the files: what every row has, and those of ``columns``; ``others`` have types of their own."""
    types = {**TYPES, **(others or {})}
    return pa.schema([(n, t) for n, t in types.items() if n in ("uid", "image", "captions") or n in columns])


def picture_of(row: Mapping[str, Any], max_pixels: int) -> Picture:
    """The picture of a row that can be used: it decodes, and there is a caption with a word in it.

    Raises:
        DropRow: the reader's reason, caption_empty, image_missing, image_too_large, image_unreadable.
    """
    encoded = row["image"]
    if isinstance(encoded, str):  # the reader's reason comes before what follows from it
        raise DropRow(encoded)
    captions = row["captions"]
    if not any(c is not None and clean(str(c), 1) for c in captions):
        raise DropRow("caption_empty")
    if isinstance(encoded, Path):
        try:
            encoded = encoded.read_bytes()
        except OSError:
            raise DropRow("image_missing") from None
    image = decode(encoded, max_pixels)
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:  # the header alone
        return Picture(encoded, str(opened.format), image)


def pictures_of(row: Mapping[str, Any], max_pixels: int, max_px: int | None) -> dict[str, Any]:
    """What is written of a row's pictures: ``image``, or of a pair ``images`` alone.

    Raises:
        DropRow: one of them cannot be used.
    """
    if not row.get("images"):
        return {"image": resized(picture_of(row, max_pixels), max_px)}
    if isinstance(row["image"], str):
        raise DropRow(row["image"])
    pair = [picture_of({**row, "image": image}, max_pixels) for image in row["images"]]
    return {"image": None, "images": [resized(picture, max_px) for picture in pair]}


def encoded_bytes(row: Mapping[str, Any]) -> int:
    """Of the pictures of a row as it is written."""
    return sum(len(image) for image in (row.get("image"), *(row.get("images") or ())) if image is not None)


def resized(picture: Picture, max_px: int | None) -> bytes:
    """The picture's own bytes, or, where its longer side exceeds ``max_px``, those of a smaller one."""
    image = picture.image
    if max_px is None or max(image.size) <= max_px:
        return picture.encoded
    scale = max_px / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if picture.format in LOSSLESS:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def values_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without its pictures, every value of the column's type.

    Raises:
        DropRow: COLUMN_unreadable for a value that is none of the column's type.
    """
    values: dict[str, Any] = {"uid": row["uid"], "captions": [_text(c) for c in row["captions"]]}
    for name in present(row):
        if name == "images":
            continue
        try:
            values[name] = _typed(row[name], TYPES[name])
        except (TypeError, ValueError, KeyError):
            raise DropRow(f"{name}_unreadable") from None
    return values


def digest(text: str) -> bytes:
    """16 bytes by which equal texts are found."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def pixel_digest(image: Image.Image) -> bytes:
    """16 bytes by which pictures with equal pixels are found, however they were encoded."""
    hashed = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    hashed.update(image.tobytes())
    return hashed.digest()


def _typed(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        if isinstance(value, str) and kind == _STRINGS:
            return [utf8(value)]
        if not isinstance(value, list):
            raise TypeError
        return [None if v is None else _typed(v, kind.value_type) for v in value]
    if pa.types.is_struct(kind):
        return {field.name: None if value[field.name] is None else _typed(value[field.name], field.type)
                for field in kind}  # fmt: skip
    if pa.types.is_floating(kind):
        return float(value)
    if isinstance(value, (list, dict)):
        raise TypeError
    return utf8(value)


def _text(caption: Any) -> str | None:
    return None if caption is None else utf8(caption)

"""Encoded bytes -> RGB image, or the reason why a row is dropped."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

#: Formats that are decoded; Pillow's others stay closed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class DropRow(Exception):
    """The row cannot be used; ``reason`` is the word it is counted under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(image: bytes | Path | str | None, max_pixels: int) -> Image.Image:
    """Decode to RGB, turned upright as EXIF says.

    Args:
        image: encoded bytes, or a file. A ``str`` is the reason why the reader could not give one.
        max_pixels: checked against the header, before anything is decoded.

    Raises:
        DropRow: image_missing, image_too_large, image_unreadable, or the reader's reason.
    """
    if isinstance(image, str):
        raise DropRow(image)
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError:
            raise DropRow("image_missing") from None
    if not image:
        raise DropRow("image_missing")
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                raise DropRow("image_too_large")
            return ImageOps.exif_transpose(opened).convert("RGB")
    except DropRow:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, MemoryError):
        raise DropRow("image_unreadable") from None

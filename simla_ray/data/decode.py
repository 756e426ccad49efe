"""Encoded bytes -> RGB image, or the reason why a row is dropped."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

#: Formats that are decoded; Pillow's others stay closed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
#: Shortest side of a picture, pixels. A side of one pixel is that of a tracking pixel or a spacer.
MIN_SIDE = 2
#: By how much a JPEG can be reduced while it is decoded.
REDUCTIONS = (8, 4, 2)
#: EXIF orientation -> what turns the picture upright; from 5 on its sides change places.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: left, upper, right, lower
Box = tuple[float, float, float, float]


class DropRow(Exception):
    """The row cannot be used; ``reason`` is the word it is counted under.

    | reason | |
    |---|---|
    | image_missing | null, or no such file |
    | image_empty | zero bytes |
    | image_unreadable | none of ``FORMATS`` (an HTML page), or its header is broken |
    | image_truncated | a picture that breaks off |
    | image_damaged | a picture that cannot be decoded for another reason |
    | image_depth_unknown | numbers of 32 bits, of which nobody says what is white (TIFF) |
    | image_too_small | a side is below ``MIN_SIDE`` |
    | image_too_large | more than ``data.max_pixels``, or a decompression bomb to Pillow |
    | image_outside_roots | a list names a file outside ``data.image_roots`` |
    | caption_empty | no caption has a word |
    | caption_not_utf8 | |
    | caption_not_text | a structure where a caption is expected |
    | caption_unreadable | the file of the captions cannot be read, or is no JSON |
    | caption_outside_roots | the file of the captions is a link that leads out of its folder |
    | keywords_unreadable, phrases_unreadable, boxes_unreadable, box_labels_unreadable | not what ``data.schema`` says |
    | qas_unreadable, statements_unreadable, images_unreadable | the same |
    | qas_empty, statements_empty | no question with an answer, no statement with a label |
    | label_unknown | no statement with one of the run's labels |
    | images_not_two | a statement about two pictures has not two |
    | tar_truncated | the tar breaks off inside the row |
    | row_group_unreadable | its row group of a Parquet file is damaged |
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class EncodedImage:
    """A picture of which the header is read; ``rgb`` decodes it.

    Args:
        image: encoded bytes, or a file. A ``str`` is the reason why the reader could not give one.
        max_pixels: checked against the header, before anything is decoded.

    Attributes:
        size: (width, height) of the upright picture at full scale.

    Raises:
        DropRow: image_missing, image_empty, image_unreadable, image_truncated, image_damaged, image_depth_unknown,
            image_too_small, image_too_large, or the reader's reason.
    """

    def __init__(self, image: bytes | Path | str | None, max_pixels: int):
        self._bytes = _read(image)
        self._decoded: Image.Image | None = None
        with _named(self._bytes):
            self._opened = Image.open(io.BytesIO(self._bytes), formats=FORMATS)
            width, height = self._opened.size
            if width * height > max_pixels:
                raise DropRow("image_too_large")
            if min(width, height) < MIN_SIDE:
                raise DropRow("image_too_small")
            if self._opened.format in ("JPEG", "MPO"):  # MPO: a JPEG with a second picture behind it
                self.size = upright_size(self._opened)
            else:  # other formats may say only behind the pixels how they are turned
                self._decoded = to_rgb(self._opened)
                self.size = self._decoded.size

    def rgb(self) -> Image.Image:
        """The picture at full scale in RGB, turned upright as EXIF says.

        Raises:
            DropRow: image_truncated, image_damaged.
        """
        return self.reduced(1, ())[0]

    def reduced(self, reduction: int, boxes: Sequence[Box]) -> tuple[Image.Image, list[Box]]:
        """What ``rgb`` gives, at a fraction of the scale, and boxes in its pixels. Once: nothing is decoded twice.

        Args:
            reduction: 1, 2, 4 or 8. A JPEG's sides are divided by it while it is decoded; other formats come at full
                scale.
            boxes: parts of the upright picture, in pixels at full scale.

        Raises:
            DropRow: image_truncated, image_damaged.
        """
        if self._decoded is not None:
            return self._decoded, list(boxes)
        width, height = self._opened.size
        drafted = None
        with _named(self._bytes):
            if reduction > 1:
                drafted = self._opened.draft("RGB", (width // reduction, height // reduction))
            orientation = _orientation(self._opened)
            self._decoded = to_rgb(self._opened)
        if drafted is None:
            return self._decoded, list(boxes)
        # The last column and row of pixels may stand for fewer than the others, so the picture ends inside them; with
        # the picture they may have been turned to the left and to the top.
        (w, h), (full_w, full_h) = self._decoded.size, self.size
        _, _, *ends = drafted[1]
        end_x, end_y = reversed(ends) if orientation >= 5 else ends
        x = w - end_x if orientation in (2, 3, 6, 7) else 0.0
        y = h - end_y if orientation in (3, 4, 7, 8) else 0.0
        # Multiplied first, so that rounding leaves a box inside.
        return self._decoded, [
            (
                x + left * end_x / full_w,
                y + upper * end_y / full_h,
                x + right * end_x / full_w,
                y + lower * end_y / full_h,
            )
            for left, upper, right, lower in boxes
        ]


def decode(image: bytes | Path | str | None, max_pixels: int) -> Image.Image:
    """Decode to RGB at full scale, turned upright as EXIF says.

    Args and errors: see ``EncodedImage``.
    """
    return EncodedImage(image, max_pixels).rgb()


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened picture once it is turned as EXIF says."""
    width, height = image.size
    turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns a TIFF itself
    return (height, width) if turned else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned upright as EXIF says; transparent pixels over white, 16 bits scaled to 8, first frame.

    The image itself where there is nothing to do.

    Raises:
        DropRow: image_depth_unknown.
    """
    image.load()  # some formats have EXIF behind the pixels
    turn = UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise DropRow("image_depth_unknown")
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _read(image: bytes | Path | str | None) -> bytes:
    if isinstance(image, str):
        raise DropRow(image)
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except (OSError, ValueError):  # ValueError: a name that no file system takes
            raise DropRow("image_missing") from None
    if image is None:
        raise DropRow("image_missing")
    if not image:
        raise DropRow("image_empty")
    return image


@contextmanager
def _named(encoded: bytes) -> Iterator[None]:
    """Whatever Pillow raises becomes the reason of a drop."""
    try:
        yield
    except DropRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DropRow("image_too_large") from None
    except Image.UnidentifiedImageError:
        raise DropRow("image_unreadable") from None
    except Exception as error:  # of broken files its plugins raise nearly everything there is
        raise DropRow("image_truncated" if _breaks_off(encoded, error) else "image_damaged") from None


def _breaks_off(encoded: bytes, error: Exception) -> bool:
    """Whether the end is missing: Pillow's decoders say so, but WebP's, whose header tells its length."""
    if encoded[:4] == b"RIFF":
        return len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")
    return "truncated" in str(error).lower()


def _orientation(image: Image.Image) -> int:
    """1..8; 1 where EXIF says nothing, nothing sensible, or cannot be read: the pixels may still be whole."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # see _named
        return 1
    return value if value in UPRIGHT else 1


def _over_white(image: Image.Image) -> Image.Image:
    """RGBA -> RGB; under full transparency a file may have any colour."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return white


def _from_16_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits, as Pillow takes of colour with 16; its own conversion of grey clips all above 255 to white."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")

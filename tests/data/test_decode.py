import io

import numpy as np
import pytest
from PIL import Image

from simla_ray.data.decode import DropRow, decode


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_exif_orientation_and_rgb():
    image = Image.new("L", (40, 20))
    image.paste(255, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = decode(encoded(image, "JPEG", quality=100, exif=exif), 10**6)
    assert upright.mode == "RGB"
    assert upright.size == (20, 40)
    assert np.asarray(upright)[0, 19].mean() > 150


def test_palette_with_transparency_becomes_rgb():
    assert decode(encoded(Image.new("P", (9, 9)), "GIF"), 10**6).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"not an image", "image_unreadable"),
        (encoded(Image.new("RGB", (40, 40)))[:60], "image_truncated"),
        (b"", "image_empty"),
        (None, "image_missing"),
        ("image_outside_roots", "image_outside_roots"),
        (encoded(Image.new("RGB", (50, 50))), "image_too_large"),
    ],
)
def test_unusable_images_are_dropped_with_a_reason(image, reason, tmp_path):
    with pytest.raises(DropRow) as dropped:
        decode(image, 2000)
    assert dropped.value.reason == reason


def test_the_pixel_limit_is_checked_before_decoding():
    header_only = encoded(Image.new("RGB", (3000, 3000)))[:200]  # the pixels themselves are not there
    with pytest.raises(DropRow) as dropped:
        decode(header_only, 10**6)
    assert dropped.value.reason == "image_too_large"


def test_other_formats_stay_closed():
    with pytest.raises(DropRow):
        decode(encoded(Image.new("RGB", (40, 40)), "PPM"), 10**6)

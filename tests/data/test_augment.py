"""Views: what is drawn, what is rendered of it, and that a JPEG decoded at less than full scale shows the same."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from simla_ray.config.load import load_run
from simla_ray.config.schema import Augment, Data
from simla_ray.data.augment import (
    COLOUR,
    GEOMETRIC,
    GREY,
    Drawn,
    draw_view,
    evaluation_view,
    reduction_for,
    render_view,
    to_array,
)
from simla_ray.data.decode import EncodedImage
from simla_ray.data.draws import rng_for
from simla_ray.data.sample import SampleMaker

RNG = np.random.default_rng


def training_view(image, px, data, may_flip, rng):
    drawn = draw_view(image.size, data, may_flip, rng)
    return render_view(image, drawn.box, px, drawn)


def gradient(px=64):
    x = np.linspace(0, 255, px, dtype=np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(x[None, :], x[:, None], np.uint8(90)), -1).astype(np.uint8))


def test_same_generator_same_view():
    a = training_view(gradient(), 32, Data(), True, RNG(5))
    b = training_view(gradient(), 32, Data(), True, RNG(5))
    assert np.array_equal(to_array(a.image), to_array(b.image))
    assert to_array(a.image).shape == (3, 32, 32)


def test_flip_only_where_allowed_and_half_of_the_time():
    data = Data(augment=Augment.crop, crop_scale_min=1.0)
    flips = [draw_view((64, 64), data, True, RNG(i)).flipped for i in range(300)]
    assert 0.4 < np.mean(flips) < 0.6
    assert not any(draw_view((64, 64), data, False, RNG(i)).flipped for i in range(50))
    i = flips.index(True)
    red = to_array(training_view(gradient(), 32, data, True, RNG(i)).image)[0].mean(0)
    assert red[0] > red[-1]  # the gradient runs the other way


def test_plain_view_shares_geometry_but_not_colour():
    data = Data(augment=Augment.full, augment_p=1.0, augment_ops=4)
    differing = 0
    for i in range(60):
        view = training_view(gradient(), 32, data, True, RNG(i))
        differing += not np.array_equal(to_array(view.image), to_array(view.plain))
    assert differing > 20
    geometric = Data(augment=Augment.geometric, augment_p=1.0, augment_ops=4)
    for i in range(20):
        view = training_view(gradient(), 32, geometric, True, RNG(i))
        assert np.array_equal(to_array(view.image), to_array(view.plain))


def test_crop_keeps_at_least_its_share():
    """On a horizontal gradient the span of a crop shows its width."""
    data = Data(augment=Augment.crop, crop_scale_min=0.25)
    spans = []
    for i in range(100):
        red = to_array(training_view(gradient(), 32, data, False, RNG(i)).image)[0].astype(int)
        spans.append((red.max() - red.min()) / 255)
    assert min(spans) > 0.35  # a quarter of the area at aspect 3/4 is 0.43 of the width
    assert min(spans) < 0.7


def test_evaluation_view_ignores_the_aspect():
    assert evaluation_view(Image.new("RGB", (100, 20)), 48).size == (48, 48)


def photo(width, height):
    """What a photograph has: smooth light, edges of all sizes and a little noise."""
    rng = RNG(width)
    image = Image.radial_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        r = float(rng.uniform(4, width / 5))
        draw.ellipse((x - r, y - r, x + r, y + r * 0.7), fill=tuple(rng.integers(0, 255, 3).tolist()))
    noise = rng.normal(0, 4, (height, width, 3))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2))) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def reference(content, px, data, may_flip, rng):
    """The plain pipeline: decode all, then draw and render one after the other. (tower's view, view without colour)"""
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    for _ in range(10):
        area = width * height * rng.uniform(data.crop_scale_min, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (x, y, x + w, y + h)
            break
    image = image.resize((px, px), Image.Resampling.BICUBIC, box=box)
    if bool(rng.random() < 0.5) and may_flip:
        image = ImageOps.mirror(image)
    if data.augment is Augment.crop:
        return to_array(image), to_array(image)
    names = GEOMETRIC + (COLOUR if data.augment is Augment.full else ())
    drawn = []
    for _ in range(data.augment_ops):
        if rng.random() < data.augment_p:
            name = names[int(rng.integers(len(names)))]
            drawn.append((name, 1 if rng.random() < 0.5 else -1))
    bilinear = Image.Resampling.BILINEAR
    for name, sign in drawn:
        level = sign * data.augment_magnitude / 10
        shift = level * 10 * px / 256
        matrices = {
            "shear_x": (1, 0.3 * level, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, 0.3 * level, 1, 0),
            "translate_x": (1, 0, shift, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, shift),
        }
        if name == "rotate":
            image = image.rotate(30 * level, bilinear, fillcolor=GREY)
        elif name in matrices:
            image = image.transform(image.size, Image.Transform.AFFINE, matrices[name], bilinear, fillcolor=GREY)
    plain = to_array(image)
    for name, _ in drawn:
        factor = 0.1 + 1.8 * data.augment_magnitude / 10
        if name == "auto_contrast":
            image = ImageOps.autocontrast(image)
        elif name == "equalize":
            image = ImageOps.equalize(image)
        elif name == "brightness":
            image = ImageEnhance.Brightness(image).enhance(factor)
        elif name == "sharpness":
            image = ImageEnhance.Sharpness(image).enhance(factor)
    return to_array(image), plain


def maker(*overrides):
    return SampleMaker(load_run(overrides=list(overrides)), None, training=True)


@pytest.mark.parametrize("crop", ["aligned", "independent"])
@pytest.mark.parametrize("augment", ["full", "geometric", "crop"])
def test_what_is_not_reduced_is_the_plain_pipeline_to_the_bit(augment, crop):
    """PNG of any size, and JPEGs too small to be reduced; the generator is left at the same place."""
    make = maker(
        f"data.augment={augment}", "data.augment_p=0.8", "data.crop_scale_min=0.2", f"objectives.mim.crop={crop}"
    )
    contents = [encoded(photo(230, 170), "PNG"), encoded(photo(95, 60)), encoded(photo(80, 95), orientation=6)]
    contents.append(encoded(photo(90, 70).convert("L"), orientation=3))
    for number, content in enumerate(contents):
        for epoch in range(8):
            rng, plain_rng = (rng_for(0, epoch, str(number)) for _ in range(2))
            picture = make._picture(content, "a ring", rng)
            expected, of_codes = reference(content, 48, make.run.data, True, plain_rng)
            if crop == "independent":
                of_codes, _ = reference(content, 48, make.run.data, True, plain_rng)
            assert np.array_equal(picture.image, expected)
            if picture.code_image is not None:
                assert np.array_equal(picture.code_image, of_codes)
            assert rng.random() == plain_rng.random()


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("crop", ["aligned", "independent"])
def test_a_reduced_jpeg_shows_what_the_full_one_shows(crop, orientation, monkeypatch):
    """Draws stay the same; the mean difference, of 255, is far below that of a shift by half a pixel, 5 to 7."""
    make = maker("data.augment=geometric", "data.crop_scale_min=0.3", f"objectives.mim.crop={crop}")
    content = encoded(photo(501, 397), orientation=orientation)
    reductions, reduced = [], EncodedImage.reduced
    monkeypatch.setattr(EncodedImage, "reduced", lambda self, r, boxes: reductions.append(r) or reduced(self, r, boxes))
    differences = []
    for epoch in range(12):
        rng, plain_rng = (rng_for(0, epoch, "a") for _ in range(2))
        picture = make._picture(content, "a ring", rng)
        views = [reference(content, 48, make.run.data, True, plain_rng)[0]]
        pictures = [picture.image]
        if crop == "independent":
            views.append(reference(content, 48, make.run.data, True, plain_rng)[0])
            pictures.append(picture.code_image)
        assert rng.random() == plain_rng.random()
        for got, full in zip(pictures, views, strict=True):
            differences.append(np.abs(got.astype(int) - full).mean())
    assert np.mean(differences) < 1.6 and np.max(differences) < 2.5
    assert 4 in reductions and 1 not in reductions


def test_the_reduction_leaves_every_box_its_pixels():
    def drawn(width, height):
        return Drawn((10.0, 10.0, 10.0 + width, 10.0 + height), False, ())

    for sides, px, expected in (
        ((383, 500), 48, 4), ((384, 500), 48, 8), ((9000, 9000), 48, 8), ((191, 900), 48, 2), ((95, 95), 48, 1),
    ):  # fmt: skip
        assert reduction_for([(drawn(*sides), px)]) == expected
    assert reduction_for([(drawn(500, 500), 48), (drawn(200, 300), 48)]) == 4
    assert reduction_for([(drawn(500, 500), 48), (drawn(500, 500), 240)]) == 2


def test_evaluation_decodes_at_full_scale():
    run = load_run()
    content = encoded(photo(501, 397))
    picture = SampleMaker(run, None, training=False)._picture(content, "a ring", RNG(0))
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(picture.image, to_array(opened.resize((48, 48), Image.Resampling.BICUBIC)))

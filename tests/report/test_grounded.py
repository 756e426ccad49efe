"""The picture with heat maps: own aspect, a limit to its size, boxes where they belong, titles that fit."""

import numpy as np
from PIL import Image

from simla_ray.report.grounded import GAP, LEAST_PX, MOST_PX, Shown, _broken, _font, grounded_picture

HEAT = np.zeros((6, 6), np.float32)
HEAT[1, 4] = 2.0


def panel_size(width, height, phrases=1):
    shown = [Shown("a ring", HEAT, None, "")] * phrases
    page = grounded_picture(Image.new("RGB", (width, height), "#808080"), shown)
    return (page.width - 2 * GAP - phrases * GAP) / (phrases + 1), page


def test_the_aspect_is_the_pictures():
    for width, height, expected in (
        (3000, 1500, MOST_PX),
        (48, 24, LEAST_PX),
        (400, 200, 400),
        (1500, 3000, MOST_PX / 2),
    ):
        assert panel_size(width, height)[0] == expected
    assert panel_size(3, 1000)[0] == 2


def test_heat_and_box_lie_where_they_belong():
    box = (0.5, 0.0, 1.0, 0.5)
    page = np.asarray(grounded_picture(Image.new("RGB", (400, 400), "#808080"), [Shown("a", HEAT, box, "")]), int)
    picture, heat = page[-418:-18, 18:418], page[-418:-18, 436:836]
    hot = np.abs(heat - heat.mean(axis=2, keepdims=True)).sum(2)  # colour on grey
    y, x = np.unravel_index(hot[5:195, 205:395].argmax(), (190, 190))
    assert abs((x + 205) / 400 - 4.5 / 6) < 0.05 and abs((y + 5) / 400 - 1.5 / 6) < 0.05
    assert (heat[300:, :100] == heat[300, 0]).all()
    changed = np.any(picture != 0x80, axis=2)
    assert changed[:200, 200:].any() and not changed[205:].any() and not changed[:, :195].any()
    assert not changed[10:190, 210:390].any()  # a frame, not a filling
    assert (picture[0, 210] == 255).all() and len(set(picture[2, 210])) > 1  # light around the colour


def test_a_title_is_broken_into_lines_that_fit():
    font = _font(16)
    lines = _broken("a rather long phrase about a picture of many things", 200, font)
    assert len(lines) > 1 and all(font.getlength(line) <= 200 for line in lines)
    assert " ".join(lines) == "a rather long phrase about a picture of many things"
    assert _broken("x" * 100, 50, font) == ["x" * 100]


def test_many_phrases_take_rows():
    one, five = panel_size(400, 200)[1], panel_size(400, 200, 5)[1]
    assert five.height > 1.8 * one.height and five.width == 3 * 400 + 4 * GAP


def test_a_map_of_zeros_is_grey():
    shown = [Shown("nothing", np.zeros((6, 6), np.float32), None, "match 1.0 %")]
    page = np.asarray(grounded_picture(Image.new("RGB", (400, 400), "#ff0000"), shown), int)
    assert (np.ptp(page[-400:-30, 450:800], axis=2) == 0).all()

"""A picture with heat maps of phrases over it, for a reader: PNG, not a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simla_ray.report.figures import COLORS, FAINT, INK, heat_over

#: Longest side of a picture in a panel, pixels: smaller ones are enlarged, larger ones reduced.
LEAST_PX, MOST_PX = 320, 640
#: Pictures below this are enlarged in blocks, as on pages.
BLOCKS_PX = 96
GAP, PAPER = 18, "#ffffff"
COLUMNS = 3


@dataclass(frozen=True)
class Shown:
    """A phrase, its map (g, g), its box x1, y1, x2, y2 in 0..1, if it has one, and a line about it."""

    phrase: str
    heat: np.ndarray
    box: Sequence[float] | None
    about: str


def grounded_picture(image: Image.Image, found: Sequence[Shown]) -> Image.Image:
    """The picture with all boxes, then for each phrase the picture in grey under its heat map; in its own aspect."""
    side = max(image.size)
    scale = min(max(side, LEAST_PX), MOST_PX) / side
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if side < BLOCKS_PX else Image.Resampling.LANCZOS)
    font = _font(max(13, round(max(size) / 32)))
    colors = [list(COLORS.values())[i % len(COLORS)] for i in range(len(found))]
    first, panels = image.copy(), []
    for shown, color in zip(found, colors, strict=True):
        panel = heat_over(image, shown.heat)
        if shown.box is not None:
            for picture in (first, panel):
                _draw_box(picture, shown.box, color)
        panels.append(_panel(panel, shown.phrase, shown.about, color, font))
    return _side_by_side([_panel(first, "the picture", "", INK, font), *panels])


def _panel(image: Image.Image, title: str, about: str, color: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The picture under its title, which is broken into as many lines as it needs."""
    lines = [(line, color) for line in _broken(title, image.width, font)]
    lines += [(about, FAINT)] if about else []
    height = round(1.35 * font.size)
    panel = Image.new("RGB", (image.width, image.height + height * len(lines) + 6), PAPER)
    draw = ImageDraw.Draw(panel)
    for i, (line, ink) in enumerate(lines):
        draw.text((0, i * height), line, fill=ink, font=font)
    panel.paste(image, (0, height * len(lines) + 6))
    return panel


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """In rows of at most ``COLUMNS``; pictures of a row end at one height, whatever their titles take."""
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    width = max(sum(p.width + GAP for p in row) for row in rows) + GAP
    heights = [max(p.height for p in row) for row in rows]
    page = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1)), PAPER)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for panel in row:
            page.paste(panel, (x, y + height - panel.height))
            x += panel.width + GAP
        y += height + GAP
    return page


def _draw_box(image: Image.Image, box: Sequence[float], color: str) -> None:
    """Light around the colour, so that it shows on any picture."""
    x1, y1, x2, y2 = (v * (image.width, image.height)[i % 2] for i, v in enumerate(box))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline="#ffffff", width=5)
    if x2 - x1 > 4 and y2 - y1 > 4:
        draw.rectangle((x1 + 1, y1 + 1, x2 - 2, y2 - 2), outline=color, width=3)


def _broken(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font(px: int) -> ImageFont.FreeTypeFont:
    """The one that matplotlib brings along, which knows more letters than Pillow's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", px)

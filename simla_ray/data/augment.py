"""Crop, flip and RandAugment of the pretraining (official ``dataset/__init__.py``), with all draws from a given
generator. A view is drawn first and rendered later, so that between the two the picture is decoded no larger than the
views need.

The visual codes must describe the very patches the tower sees, so crop, flip and geometric ops are shared; colour ops
come after them and touch only the tower's image. (The official code draws an independent second view for the codes and
mixes geometric and colour ops in any order; ``mim.crop: independent`` gives the former back.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from simla_ray.config.schema import Augment, Data
from simla_ray.data.decode import REDUCTIONS, Box

GREY = (128, 128, 128)
GEOMETRIC = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOUR = ("auto_contrast", "equalize", "brightness", "sharpness")
BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one view: ``box`` in pixels of the picture at full scale, RandAugment's ops with their levels
    -1..1.
    """

    box: Box
    flipped: bool
    ops: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class View:
    """One augmented view: ``image`` for the tower, ``plain`` the same geometry without colour ops, both PIL."""

    image: Image.Image
    plain: Image.Image


def draw_view(size: tuple[int, int], data: Data, may_flip: bool, rng: np.random.Generator) -> Drawn:
    """Random resized crop, flip with probability 1/2 where allowed, RandAugment; nothing is decoded for it.

    Args:
        size: (width, height) of the upright picture at full scale.
    """
    box = _crop_box(size, data.crop_scale_min, rng)
    flipped = bool(rng.random() < 0.5) and may_flip
    if data.augment is Augment.crop:
        return Drawn(box, flipped, ())
    names = GEOMETRIC + (COLOUR if data.augment is Augment.full else ())
    ops = tuple(
        (names[int(rng.integers(len(names)))], (1 if rng.random() < 0.5 else -1) * data.augment_magnitude / 10)
        for _ in range(data.augment_ops)
        if rng.random() < data.augment_p
    )
    return Drawn(box, flipped, ops)


def reduction_for(wanted: Iterable[tuple[Drawn, int]]) -> int:
    """The largest reduction, 1 for none, that leaves every view's box at least (px, px) pixels.

    Args:
        wanted: views with their px.
    """
    room = math.inf
    for drawn, px in wanted:
        left, upper, right, lower = drawn.box
        room = min(room, (right - left) / px, (lower - upper) / px)
    return next((r for r in REDUCTIONS if r <= room), 1)


def render_view(image: Image.Image, box: Box, px: int, drawn: Drawn) -> View:
    """The drawn view at (px, px).

    Args:
        image: upright RGB, at any scale.
        box: the drawn one, in its pixels.
    """
    image = image.resize((px, px), BICUBIC, box=box)
    if drawn.flipped:
        image = ImageOps.mirror(image)
    for name, level in drawn.ops:
        if name in GEOMETRIC:
            image = _geometric(image, name, level)
    plain = image
    for name, level in drawn.ops:
        if name in COLOUR:
            image = _colour(image, name, abs(level))
    return View(image, plain)


def evaluation_view(image: Image.Image, px: int) -> Image.Image:
    """Resize to (px, px) without regard to the aspect, as the official test transform does."""
    return image.resize((px, px), BICUBIC)


def to_array(image: Image.Image) -> np.ndarray:
    """(3, px, px) uint8"""
    # Band by band Pillow lays the planes out itself, several times faster than numpy's transposed copy.
    return np.stack([np.asarray(band) for band in image.split()])


def _crop_box(size: tuple[int, int], scale_min: float, rng: np.random.Generator) -> Box:
    """A box of scale_min..1 of the area and aspect 3/4..4/3 (torchvision's RandomResizedCrop), else the whole image."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(scale_min, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return x, y, x + w, y + h
    return 0.0, 0.0, float(width), float(height)


def _geometric(image: Image.Image, name: str, level: float) -> Image.Image:
    """level -1..1: shear 0.3, translation 10 pixels of 256, rotation 30 degrees at 1 (official ``randaugment.py``)."""
    if name == "identity":
        return image
    if name == "rotate":
        return image.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY)
    shift = level * 10 * image.width / 256
    matrix = {
        "shear_x": (1, 0.3 * level, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * level, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _colour(image: Image.Image, name: str, level: float) -> Image.Image:
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    enhancer = ImageEnhance.Brightness if name == "brightness" else ImageEnhance.Sharpness
    return enhancer(image).enhance(0.1 + 1.8 * level)

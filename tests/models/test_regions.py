"""Geometry by hand numbers, means by area against a loop, features without a gradient."""

import numpy as np
import pytest
import torch

from simla_ray.models.regions import STYLES, RegionFeatures, average_under, box_geometry


def test_geometry_by_hand():
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.4]], dtype=torch.float64)
    np.testing.assert_allclose(box_geometry(boxes, "six")[0], [0.1, 0.2, 0.5, 0.4, 0.4, 0.2], rtol=1e-12)
    np.testing.assert_allclose(box_geometry(boxes, "seven")[0], [0.1, 0.2, 0.5, 0.4, 0.4, 0.2, 0.08], rtol=1e-12)
    for style, width in STYLES.items():
        assert box_geometry(torch.rand(2, 5, 4), style).shape == (2, 5, width)


def slow_average(image, box):
    """Mean of (C, h, w) under one box, pixel by pixel."""
    total, area = np.zeros(len(image)), 0.0
    h, w = image.shape[1:]
    x1, y1, x2, y2 = box * np.array([w, h, w, h])
    for i in range(h):
        for j in range(w):
            inside = max(0, min(x2, j + 1) - max(x1, j)) * max(0, min(y2, i + 1) - max(y1, i))
            total, area = total + inside * image[:, i, j], area + inside
    return total / area


@pytest.mark.parametrize("cells", [1, 3])
def test_means_under_boxes_equal_a_loop(cells):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 3, 5, 7))
    low = rng.uniform(0, 0.6, (2, 4, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.02, 0.4, (2, 4, 2))], -1)
    found = average_under(torch.from_numpy(maps), torch.from_numpy(boxes), cells)
    for b in range(2):
        for r in range(4):
            size = (boxes[b, r, 2:] - boxes[b, r, :2]) / cells
            for k in range(cells):
                for m in range(cells):
                    corner = boxes[b, r, :2] + size * [m, k]
                    wanted = slow_average(maps[b], np.concatenate([corner, corner + size]))
                    np.testing.assert_allclose(found[b, r, :, k, m], wanted, rtol=1e-9)


def test_a_box_that_is_a_pixel_gives_the_pixel_and_padding_gives_zeros():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 0.75], [0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0]]])
    assert average_under(maps, boxes)[0, :, 0, 0, 0].tolist() == pytest.approx([9.0, 7.5, 0.0])


def test_features_are_pixels_in_normalised_units_without_a_gradient():
    make = RegionFeatures(None)
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]]).expand(2, 2, 4)
    found = make(image, boxes)
    assert found.shape == (2, 2, 192) and make.width == 192 and not found.requires_grad
    normal = (image - make.mean) / make.std
    np.testing.assert_allclose(found[:, 1].view(2, 3, 8, 8), normal[:, :, :8, :8], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0, 0].view(3, 8, 8)[0, 0, 0], normal[0, 0, :2, :2].mean(), rtol=1e-4)
    assert not list(make.parameters()) and not make.train().training

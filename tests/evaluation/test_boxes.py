import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from simla_ray.evaluation import boxes
from simla_ray.evaluation.boxes import areas, box_scores, boxes_around_peak, iou, propose, usable


def random_boxes(rng, n):
    corners = np.sort(rng.random((n, 2, 2)), axis=1)
    return corners.reshape(n, 4)


def test_iou_is_torchvisions():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 200), random_boxes(rng, 150)
    b[:20] = a[:20]
    b[20:30, 2:] = b[20:30, :2]  # no area
    expected = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(iou(a, b), expected, rtol=1e-12, atol=1e-15)
    assert iou(a[:1], a[:1])[0, 0] == 1


def test_iou_by_hand():
    a = np.array([[0, 0, 0.5, 0.5]])
    b = np.array([[0.25, 0.25, 0.75, 0.75], [0.5, 0, 1, 0.5], [0, 0, 0.5, 0.25], [0.2, 0.2, 0.2, 0.2]])
    np.testing.assert_allclose(iou(a, b)[0], [1 / 7, 0, 1 / 2, 0])
    assert iou(np.zeros((1, 4)), np.zeros((1, 4)))[0, 0] == 0


def slow_scores(heat, pixel_boxes, side):
    """Enlarge the map to the picture, then add up the pixels of a box, as the paper's code does."""
    picture = F.interpolate(torch.from_numpy(heat)[None, None], (side, side), mode="bicubic")[0, 0].numpy()
    scores = []
    for x1, y1, x2, y2 in pixel_boxes:
        inside = sum(picture[y, x] for y in range(y1, y2) for x in range(x1, x2))
        scores.append(inside / ((x2 - x1) * (y2 - y1)) ** 0.5)
    return np.array(scores)


@pytest.mark.parametrize("grid", [6, 24])
def test_scores_are_those_of_pixels(grid):
    rng = np.random.default_rng(grid)
    heat = rng.random((grid, grid)) ** 3
    corners = np.sort(rng.integers(0, 49, (40, 2, 2)), axis=1).reshape(40, 4)
    corners = corners[(corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])]
    slow = slow_scores(heat, corners.tolist(), 48)
    scale = heat.size / heat.sum() / 48  # ours are shares of the heat and of the picture
    np.testing.assert_allclose(box_scores(heat, corners / 48), slow * scale, rtol=1e-9)


def test_scores_by_hand():
    even = np.ones((6, 6))
    found = box_scores(even, np.array([[0, 0, 1, 1], [0, 0, 0.25, 0.25], [0.1, 0.3, 0.35, 0.55], [0.4, 0.4, 0.4, 0.9]]))
    np.testing.assert_allclose(found, [1, 0.25, 0.25, 0])
    assert box_scores(np.zeros((6, 6)), np.array([[0, 0, 1, 1]])).tolist() == [0]


def blob(grid, x, y, wide, high):
    """A smooth map, hottest at (x, y)."""
    at = (np.arange(grid) + 0.5) / grid
    return np.exp(-((at[None] - x) ** 2) / (2 * wide**2) - ((at[:, None] - y) ** 2) / (2 * high**2))


def test_proposals_lie_around_the_peak():
    found, scores = propose(blob(12, 0.7, 0.3, 0.12, 0.06))
    assert 1 < len(found) <= len(boxes.THRESHOLDS)
    np.testing.assert_array_equal(scores, box_scores(blob(12, 0.7, 0.3, 0.12, 0.06), found))
    x1, y1, x2, y2 = found[0]
    assert x1 < 0.7 < x2 and y1 < 0.3 < y2
    assert (x2 - x1) > 1.5 * (y2 - y1)
    assert (np.diff(areas(found)) > 0).all()
    assert (found[:-1, :2] >= found[1:, :2]).all() and (found[:-1, 2:] <= found[1:, 2:]).all()
    again = propose(blob(12, 0.7, 0.3, 0.12, 0.06))
    assert np.array_equal(found, again[0]) and np.array_equal(scores, again[1])


def test_what_does_not_touch_the_peak_is_left_out():
    heat = blob(12, 0.2, 0.2, 0.07, 0.07) + 0.9 * blob(12, 0.8, 0.8, 0.07, 0.07)
    found, _ = propose(heat)
    assert (found[:, 2:] < 0.6).all()


def test_the_box_is_as_wide_as_half_the_height():
    """A map's slopes are straight: half the height is half-way down."""
    at = (np.arange(24) + 0.5) / 24
    heat = np.clip(1 - np.abs(at - 0.5) / 0.4, 0, None)[None] * np.clip(1 - np.abs(at - 0.5) / 0.2, 0, None)[:, None]
    found, _ = propose(heat)
    np.testing.assert_allclose(found[0], [0.3, 0.4, 0.7, 0.6], atol=0.02)


def slow_component(allowed, seed):
    todo, part = [seed], {seed}
    while todo:
        y, x = todo.pop()
        for cell in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if cell not in part and all(0 <= c < len(allowed) for c in cell) and allowed[cell]:
                part.add(cell)
                todo.append(cell)
    return part


def test_proposals_against_a_slow_search():
    rng = np.random.default_rng(3)
    heats = rng.random((20, 6, 6)) ** 2
    heats[7] = 0
    every = boxes_around_peak(heats)
    for heat, found in zip(heats, every, strict=True):
        fine = F.interpolate(torch.from_numpy(heat)[None, None], (48, 48), mode="bicubic")[0, 0].numpy()
        seed = np.unravel_index(fine.argmax(), fine.shape)
        for threshold, box in zip(boxes.THRESHOLDS, found, strict=True):
            if heat.max() == 0:
                assert (box == 0).all()
                continue
            part = slow_component(fine >= threshold * fine.max(), tuple(map(int, seed)))
            ys, xs = zip(*part, strict=True)
            expected = np.array([min(xs), min(ys), max(xs) + 1, max(ys) + 1]) / 48
            np.testing.assert_allclose(box, expected)


def test_a_thousand_maps_take_little_time():
    heats = np.random.default_rng(0).random((1000, 24, 24)) ** 4
    began = time.process_time()
    boxes_around_peak(heats, boxes.THRESHOLDS[:1])
    assert time.process_time() - began < 2


def test_a_map_of_zeros_proposes_nothing():
    found, scores = propose(np.zeros((6, 6)))
    assert found.shape == (0, 4) and scores.shape == (0,)


def test_bad_boxes_are_counted():
    given = [
        [0.1, 0.1, 0.5, 0.5],
        [-0.2, 0.1, 0.5, 1.3],  # over two edges
        [-0.001, 0, 1.001, 1],  # half a pixel
        [1.2, 0.1, 1.5, 0.5],  # beside the picture
        [120, 30, 200, 90],  # in pixels
        [0.5, 0.5, 0.5, 0.9],
        [0.9, 0.5, 0.5, 0.9],  # the wrong way round
        [float("nan"), 0.5, 0.5, 0.9],
    ]
    found, counts = usable(given)
    np.testing.assert_allclose(found, [[0.1, 0.1, 0.5, 0.5], [0, 0.1, 0.5, 1], [0, 0, 1, 1]])
    assert counts == {"box_clipped": 1, "box_outside": 2, "box_without_area": 3}
    found, counts = usable([])
    assert found.shape == (0, 4) and not counts

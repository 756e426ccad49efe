import itertools
import json

import numpy as np
import pytest

from simla_ray.data import scene


@pytest.mark.parametrize(
    ("named", "relations", "expected"),
    [
        ([{"color": "red", "shape": "circle"}], [], True),
        ([{"size": "large", "color": "red", "shape": "circle"}], [], False),
        ([{"color": "blue", "shape": "circle"}], [], False),
        # Two names need two objects, even where one object fits both.
        ([{"color": "red"}, {"color": "red", "shape": "circle"}], [], False),
        ([{"shape": "circle"}, {"color": "red", "shape": "circle"}], [], True),
        ([{"color": "red"}, {"color": "green"}], [[0, "left", 1]], True),
        ([{"color": "red"}, {"color": "green"}], [[1, "right", 0]], True),
        ([{"color": "red"}, {"color": "green"}], [[0, "right", 1]], False),
        ([{"color": "red"}, {"color": "green"}], [[0, "above", 1]], False),
        ([{"color": "red"}, {"color": "green"}], [[1, "below", 0]], False),
        # The centres differ by 0.1 in height: too little for either relation.
        ([{"color": "red"}, {"color": "white"}], [[0, "above", 1]], False),
        ([{"color": "red"}, {"color": "white"}], [[1, "above", 0]], False),
        ([{"color": "green"}, {"color": "white"}], [[1, "below", 0]], False),
        ([{"color": "yellow"}, {"color": "red"}], [[0, "below", 1]], True),
        # Of the two circles only the second is right of the heart by the margin.
        ([{"shape": "circle"}, {"color": "yellow"}], [[0, "right", 1]], True),
    ],
)
def test_satisfies_on_a_scene_made_by_hand(named, relations, expected):
    objects = [
        {"shape": "circle", "color": "red", "size": "small", "box": [0.0, 0.0, 0.2, 0.2]},
        {"shape": "circle", "color": "green", "size": "small", "box": [0.5, 0.0, 0.7, 0.2]},
        {"shape": "ring", "color": "white", "size": "small", "box": [0.8, 0.1, 1.0, 0.3]},
        {"shape": "heart", "color": "yellow", "size": "large", "box": [0.0, 0.5, 0.4, 0.9]},
    ]
    assert scene.satisfies(json.dumps({"objects": named, "relations": relations}), json.dumps(objects)) is expected


@pytest.mark.parametrize("px", [32, 33, 48, 63])
def test_a_scene_of_four_largest_objects_finds_room(px):
    side = int(0.42 * px)
    for seed in range(20):
        corners = scene._place(np.random.default_rng(seed), [side] * 4, px)
        assert all(0 <= x <= px - s and 0 <= y <= px - s for x, y, s in corners)
        for (x, y, s), (u, v, t) in itertools.combinations(corners, 2):
            assert x + s < u or u + t < x or y + s < v or v + t < y

import numpy as np
import pytest

from simla_ray.data.codes import kmeans, spread_of


def test_the_spread_of_codes_is_the_mean_squared_distance_to_the_nearest():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 3.0]], np.float32)
    assert spread_of(points, np.array([[0.0, 0.0], [5.0, 5.0]], np.float32)) == pytest.approx((0 + 1 + 4) / 3)
    assert spread_of(points, kmeans(points, 3, 5, 0)) > 0  # something to divide by, where every point has its own

import math

import numpy as np

from simla_ray.evaluation.examples import number, pick, spread


def test_half_of_each_kind_where_there_are_enough():
    flags = np.arange(100) % 5 == 0
    chosen = pick(flags, 12)
    assert len(set(chosen)) == 12 and chosen == sorted(chosen)
    assert flags[chosen].sum() == 6


def test_the_other_kind_fills_up():
    assert flags_of(pick([True] * 30, 12), [True] * 30) == 12
    assert pick([True, False, False], 12) == [0, 1, 2]
    flags = [True] * 2 + [False] * 50
    assert len(pick(flags, 12)) == 12 and flags_of(pick(flags, 12), flags) == 2
    assert pick([], 12) == []


def flags_of(chosen, flags):
    return sum(flags[i] for i in chosen)


def test_spread_is_even_and_complete():
    assert spread(3, 10).tolist() == [0, 1, 2]
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert len(set(spread(1234, 1000).tolist())) == 1000


def test_numbers_that_json_lacks():
    assert number(np.float32(0.123456)) == 0.1235
    assert number(-math.inf) is None and number(math.nan) is None

"""A thread that takes items ahead: their order, their number, errors, and its end."""

import itertools
import threading
import time

import pytest

from simla_ray.data import prefetch
from simla_ray.data.prefetch import Prefetched


def test_items_come_in_order_and_end():
    assert list(Prefetched(iter(range(100)), 2)) == list(range(100))


def test_no_more_than_depth_is_taken_ahead():
    taken = []

    def counting():
        for i in itertools.count():
            taken.append(i)
            yield i

    ahead = Prefetched(counting(), 2)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(taken) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(taken) == 4  # one given, two ready, one that finds no room
    ahead.close()
    assert not ahead.thread.is_alive()


def test_an_error_is_raised_after_the_items_before_it_and_again():
    def failing():
        yield 1
        raise ValueError("broken")

    ahead = Prefetched(failing(), 2)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(ahead)


def test_close_ends_a_thread_whose_items_nobody_takes():
    before = threading.active_count()
    ahead = Prefetched(iter(range(100)), 1)
    ahead.close()
    assert threading.active_count() == before


def test_an_exception_inside_with_ends_the_thread_and_is_raised():
    with pytest.raises(ValueError, match="in the loop"), Prefetched(itertools.count(), 2) as ahead:
        assert next(ahead) == 0
        raise ValueError("in the loop")
    assert not ahead.thread.is_alive()
    ahead.close()


def test_an_iterator_that_hangs_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(prefetch, "CLOSE_S", 0.1)
    hanging, began = threading.Event(), time.monotonic()

    def items():
        yield 0
        hanging.wait()

    with pytest.raises(ValueError, match="in the loop"), Prefetched(items(), 2) as ahead:
        next(ahead)
        raise ValueError("in the loop")
    assert time.monotonic() - began < 5
    hanging.set()
    ahead.thread.join()

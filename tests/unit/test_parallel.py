"""`map_in_order` yields results in order, buffers only a few, and raises an item's error in place of its result."""

import threading
import time

import pytest

from data_prep.parallel import map_in_order


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number

    assert list(map_in_order(slow_first, range(20), threads=4)) == list(range(20))


def test_only_a_few_results_are_buffered_for_a_slow_consumer() -> None:
    started: list[int] = []
    results = map_in_order(started.append, range(1000), threads=2)
    next(results)
    time.sleep(0.05)
    assert len(started) <= 4
    results.close()
    assert len(started) <= 4


def test_an_error_is_raised_in_place_of_the_result_and_no_thread_is_left() -> None:
    def divide(number: int) -> float:
        return 1 / (3 - number)

    before, results = threading.active_count(), map_in_order(divide, range(100), threads=3)
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before

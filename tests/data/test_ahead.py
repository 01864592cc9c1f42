"""Work ahead comes in order, is never far ahead, and stops when nobody wants more."""

import threading

import pytest

from engine.data.ahead import loaded


def test_results_and_errors_come_at_their_places():
    def make(number: int) -> int:
        if number == 5:
            raise KeyError(number)
        return number * number

    found = loaded(make, range(9), threads=3)
    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(KeyError):
        next(found)


def test_it_is_a_few_ahead_and_stops_when_it_is_closed():
    asked, gate = [], threading.Event()

    def wanted():
        for number in range(1000):
            asked.append(number)
            yield number

    found = loaded(lambda number: gate.wait(60) and number, wanted(), threads=2)
    gate.set()
    assert next(found) == 0 and len(asked) == 5
    assert next(found) == 1 and len(asked) == 6
    found.close()
    assert len(asked) == 6 and list(found) == []

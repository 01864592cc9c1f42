"""Signals: at once, or looked at where work can end well; a second one does not wait."""

import os
import signal

import pytest

from engine.core import stopping
from engine.core.stopping import Interrupted, StopRequest

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its last entry is now."""
    times = [0.0]
    monkeypatch.setattr(stopping, "monotonic", lambda: times[-1])
    return times


@BOTH
def test_a_signal_ends_work_at_once_and_says_how(number: int):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, StopRequest():
        os.kill(os.getpid(), number)
    assert stopped.value.status == 128 + number and str(stopped.value) == signal.Signals(number).name
    assert signal.getsignal(number) == before


@BOTH
def test_where_work_ends_well_it_is_a_flag(number: int, clock: list[float]):
    with StopRequest() as stop:
        with stop.deferred():
            assert not stop.raised
            os.kill(os.getpid(), number)
            assert stop.raised
            os.kill(os.getpid(), number)  # a launcher hands on what the terminal has sent as well
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)


@BOTH
def test_a_second_one_does_not_wait(number: int, clock: list[float]):
    with StopRequest() as stop, stop.deferred():
        os.kill(os.getpid(), number)
        clock.append(stopping.AGAIN)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)


def test_the_other_signal_is_not_a_second_one(clock: list[float]):
    with StopRequest() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        clock.append(10.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.raised

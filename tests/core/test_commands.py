"""A command's exit status, and the one sentence where it could not do its work."""

import os
import signal

import pytest

from engine.core.commands import exit_status
from engine.core.errors import BadInput


def refuses() -> None:
    raise BadInput("no such thing; choose another.")


@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (refuses, 2, "error: no such thing; choose another.\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped; it goes on\n"),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "stopped; it goes on\n"),
    ],
)
def test_what_becomes_of_work(work, status: int, said: str, capsys: pytest.CaptureFixture):
    before = signal.getsignal(signal.SIGTERM)
    assert exit_status(work, "it goes on") == status
    assert capsys.readouterr() == ("", said)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_nobody_foresaw_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0, "it goes on")

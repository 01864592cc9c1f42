"""What SIGTERM and Ctrl-C do: end work at once, or, where it can end well a little later, be looked at there."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

AGAIN = 1.0  # seconds; schedulers and launchers send one signal to a process twice at once


class Interrupted(KeyboardInterrupt):
    """A signal came; `status` is what a shell expects of a process that it ended."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopRequest:
    """While it is entered, a signal raises `Interrupted` in the main thread; inside `deferred` it sets a flag instead, and only
    the same signal a second time, a second or more later, raises.

    Attributes:
        raised: whether a signal came.
    """

    def __init__(self) -> None:
        self.raised = False
        self._deferring = False
        self._first: dict[int, float] = {}
        self._before: dict[int, object] = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Who is inside looks at `raised`."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    def _come(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        first = self._first.setdefault(number, monotonic())
        if not self._deferring or monotonic() - first >= AGAIN:
            raise Interrupted(number)

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._come)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""What comes after the work (pictures, judging, reports) cannot take its results away."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.errors import BadInput


class Extras:
    """Parts that may fail, each by itself: what does is named, and the rest goes on.

    Args:
        say: told of each that failed, in a line.

    Attributes:
        left_out: part -> why it is missing.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.left_out: dict[str, str] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Inside, an error ends this part alone; a stop request (Ctrl-C) ends all."""
        try:
            yield
        except Exception as error:
            self.left_out[part] = why = complaint(error)
            self.say(f"{part} left out: {why}")


def complaint(error: Exception) -> str:
    """What went wrong, in a line: the sentence about bad input, or a defect's kind, words and place."""
    return str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}{_place(error)}"


def _place(error: Exception) -> str:
    """Where it arose, so that it can be reported: the last line of our own, or the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "engine" in Path(frame.filename).parts] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""

"""Runs with a small mistake in the engine's code.

main([MISTAKE, *ARGUMENTS OF engine.train])      (in a process that tests.faults.server forks)
"""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import FunctionType

from engine.core import optim
from kernels.patches import reference
from tests.golden import short_run

# by name, of what: the function, what stands there, what does with the mistake
MISTAKES: dict[str, tuple[Callable, str, str]] = {
    "rates a step ahead": (optim.share_of_peak, "WARMUPS[warmup]\n", "WARMUPS[warmup]\n    step += 1\n"),
    "another epsilon in the loss": (reference.masked_pixel_loss, "variance + 1e-6", "variance + 2e-6"),
    "schedules that end a step early": (optim.cosine, "max(1, total_steps)", "max(1, total_steps - 1)"),
}


def plant(function: FunctionType, right: str, wrong: str) -> None:
    """Let a function of a module have `wrong` where its source has `right`, once, for all who have imported it."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(right) != 1:
        raise ValueError(f"{function.__qualname__} does not have {right!r} once")
    space = dict(function.__globals__)
    exec(compile(source.replace(right, wrong), function.__code__.co_filename, "exec"), space)
    function.__code__ = space[function.__name__].__code__


def main(arguments: Sequence[str]) -> int:
    mistake, *others = arguments
    plant(*MISTAKES[mistake])
    return short_run.main(others)

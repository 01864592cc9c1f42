"""How far long work on images is, told while it goes on."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 60.0  # seconds


@contextmanager
def watched(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Gives what is to be told how many more images are done: in a terminal it moves a bar, else it says every minute how far it
    is."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    started = said = time.monotonic()
    done = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)

        def watch(more: int) -> None:
            nonlocal said, done
            progress.advance(bar, more)
            done, now = done + more, time.monotonic()
            if console.is_terminal or now - said < LINE_EVERY:
                return
            said = now
            left = (now - started) * (total - done) / done
            print(f"{what}: {done:,} of {total:,} images, {left / 60:.0f} min left", file=sys.stderr, flush=True)

        yield watch

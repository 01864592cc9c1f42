"""Work on images that threads do a little ahead of who wants it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine.data.sources import usable_cpus

A = TypeVar("A")
T = TypeVar("T")


def loaded(make: Callable[[A], T], wanted: Iterable[A], threads: int | None = None) -> Iterator[T]:
    """make(each) of what is wanted, in order, a few ahead in threads of their own; what `make` raises comes at its place."""
    threads = threads or min(usable_cpus(), 16)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for each in wanted:
                waiting.append(pool.submit(make, each))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""How the encoded bytes of a step's images come into the graph: by name, or read ahead by threads of ours.

Image files are named to DALI, which reads them in its own threads. It cannot read parts of a file, so those of shards are read
here, a step ahead, and handed over.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode

from engine.data.graph import Inputs
from engine.data.names import ENCODED
from engine.data.stored import Ranges, Stored

AHEAD = 1  # steps beyond those that DALI's own queue asks for

# a step -> the ids that are read, int64 [b], and what the graph is given for them; StopIteration past the last step
Plan = Callable[[int], tuple[np.ndarray, Inputs]]


class Unreadable(RuntimeError):
    """An image of a step cannot be read. DALI never hears of it: given something else than an image, its decoder may crash."""


@dataclass(frozen=True)
class Step:
    """One step, as a graph wants it.

    Attributes:
        ids: int64 [b].
        inputs: as planned.
        images: called once, gives what `encoded` wants of each image. Raises Unreadable.
    """

    ids: np.ndarray
    inputs: Inputs
    images: Callable[[], list[np.ndarray]]


class ByName:
    """Gives the names of files, uint8 [characters] each."""

    def __init__(self, images: Stored, plan: Plan):
        self._images, self._plan = images, plan

    def __call__(self, step: int) -> Step:
        """Raises StopIteration as the plan does."""
        ids, inputs = self._plan(step)
        return Step(ids, inputs, lambda: [self._name(index) for index in ids])

    def _name(self, index: int) -> np.ndarray:
        return np.frombuffer(f"{self._images.root}/{self._images.paths[index]}".encode(*ENCODED), np.uint8)

    def encoded(self, given: DataNode) -> DataNode:
        """The encoded images, in the graph."""
        return fn.io.file.read(given, dont_use_mmap=True)  # a mapped file that shrinks meanwhile would kill the process

    def close(self) -> None:
        """There is nothing to free."""


class ReadAhead:
    """Gives the bytes of parts of files, uint8 [bytes] each; steps have to be asked for in order."""

    def __init__(self, ranges: Ranges, plan: Plan, threads: int):
        self._ranges, self._plan, self._threads = ranges, plan, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shards")
        self._begun: dict[int, Step | None] = {}  # None past the last

    def __call__(self, step: int) -> Step:
        """Raises StopIteration as the plan does."""
        for wanted in range(step, step + AHEAD + 1):
            if wanted not in self._begun:
                self._begun[wanted] = self._begin(wanted)
        begun = self._begun.pop(step)
        if begun is None:
            raise StopIteration
        return begun

    def _begin(self, step: int) -> Step | None:
        try:
            ids, inputs = self._plan(step)
        except StopIteration:
            return None
        parts = [self._pool.submit(self._read, part) for part in np.array_split(ids, self._threads)]
        return Step(ids, inputs, lambda: list(chain.from_iterable(part.result() for part in parts)))

    def _read(self, ids: np.ndarray) -> list[np.ndarray]:
        try:
            return [self._ranges.read(index) for index in ids]
        except OSError as error:
            raise Unreadable(str(error)) from error

    def encoded(self, given: DataNode) -> DataNode:
        """The encoded images, in the graph."""
        return given

    def close(self) -> None:
        """Lets the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._begun.clear()


def source(images: Stored, plan: Plan, threads: int) -> ByName | ReadAhead:
    """What gives these images to a graph, step by step."""
    return ByName(images, plan) if images.ranges is None else ReadAhead(images.ranges, plan, threads)

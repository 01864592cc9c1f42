"""Saves beside the steps: a step pays for a copy of the state in host memory, and a thread writes it.

A thread will do, since safetensors, SHA-256 and the system's calls work without Python's lock. One save is under way at most: it
writes the checkpoint, reads it back, removes older ones and replaces the export, in this order, all of it made of the copy. Only
the thread that trains speaks with other ranks.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from types import TracebackType

from engine.core import dist
from engine.core.errors import BadInput
from engine.data.sources import check_bad
from engine.training import checkpoint, folder
from engine.training.log import RunLog
from engine.training.parts import Parts
from engine.training.state import HostCopy, TrainState, content, position

WORTH_TELLING = 0.5  # seconds of waiting
NICENESS = 10  # a tenth of what a thread that trains gets of a core they share


class Saving:
    """The saves of a stage into the run folder `out`, which the first rank writes. Leaving it waits for the save under way; after
    a signal that cannot wait it is given up before its next file.
    """

    def __init__(self, parts: Parts, state: TrainState, out: Path, log: RunLog):
        self._parts, self._state, self._out, self._log = parts, state, out, log
        self._copy, self._writer = HostCopy(), Writer()
        self._has_room = not parts.ranks.first
        self._saved = self._told = False

    def begin(self) -> None:
        """Save the state of this moment: the former save is waited for, this one is not.

        Raises:
            BadInput: too many images are bad, of all ranks together; this save is complete then.
            OSError, SafetensorError: the former save failed.
        """
        parts, state = self._parts, self._state
        state.bad_files[:] = dist.union(state.bad_files)
        if parts.ranks.first:
            self._wait_for_former()
            step = parts.stages[state.stage].first_step + state.step
            where = position(state) | {"images": parts.identity.as_json()}
            tensors = self._copy.take(content(state))

            def write(go_on: Callable[[], None]) -> None:
                self._copy.wait()
                checkpoint.save(self._out / "checkpoints", step, tensors, where, parts.plan.train.keep, go_on)
                go_on()
                folder.export(parts, state.method, tensors, self._out / "export")

            self._writer.begin(write)
            self._saved = True
            _list_bad_files(parts, state, self._out, self._log)
        # each rank held its own finds against the limit; here all of them are
        images = parts.train_images
        try:
            check_bad((*images.bad, *state.bad_files), len(images), images.bad_limit, self._out / folder.BAD_FILES)
        except BadInput:
            self.finish()
            raise

    def check(self) -> None:
        """After every step, without waiting: raise what went wrong. After the first one, room is made for copies."""
        self._writer.check()
        if not self._has_room:
            self._has_room = True
            like = content(self._state)
            self._writer.begin(lambda _: self._copy.make_room(like))

    def finish(self) -> None:
        """On all ranks, wait until the save under way is complete. What went wrong with it is raised on all."""
        dist.from_first(self._writer.wait)

    def _wait_for_former(self) -> None:
        began = time.monotonic()
        self._writer.wait()
        waited = time.monotonic() - began
        if self._saved and waited > WORTH_TELLING and not self._told:
            self._told = True
            self._log.message(
                f"a save took so long that the next one had to wait {waited:.1f} s for it; --save-every makes them rarer"
            )

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, KeyboardInterrupt):
                self._writer.wait()
        except Exception as fault:
            if error is None:
                raise
            self._log.message(f"the save under way failed as well: {fault}")
        finally:
            self._writer.close()


def complete(parts: Parts, state: TrainState, out: Path, log: RunLog) -> None:
    """What belongs to the checkpoint that this state is of, where a kill may have come before it was written."""
    folder.export(parts, state.method, content(state), out / "export")
    _list_bad_files(parts, state, out, log)


def _list_bad_files(parts: Parts, state: TrainState, out: Path, log: RunLog) -> None:
    if new := folder.list_bad_files(parts, state, out):
        more = ", ..." if len(new) > 3 else ""
        log.note("bad files", f"{len(new)} images were unreadable and replaced: {', '.join(new[:3])}{more}")


class Writer:
    """A thread that does one piece of work at a time."""

    def __init__(self) -> None:
        self._thread = futures.ThreadPoolExecutor(1, "saving", initializer=_after_others)
        self._under_way: futures.Future | None = None
        self._closed = False

    def begin(self, work: Callable[[Callable[[], None]], None]) -> None:
        """After what is under way. The work is given what it asks before each part of it: whether to go on."""
        self.wait()
        self._under_way = self._thread.submit(work, self._go_on)

    def check(self) -> None:
        """Raise what the work raised, if it is done."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Until the work is done; raises what it raised, here and once."""
        if self._under_way is not None:
            futures.wait([self._under_way])  # a signal that ends the wait leaves it under way
            done, self._under_way = self._under_way, None
            done.result()

    def close(self) -> None:
        """The work that is under way ends where it next asks; the thread is gone afterwards."""
        self._closed = True
        self._thread.shutdown()

    def _go_on(self) -> None:
        if self._closed:
            raise futures.CancelledError


def _after_others() -> None:
    """Where threads want more cores than there are, those that train come first: on Linux a thread has a niceness of its own."""
    if sys.platform == "linux":
        os.nice(NICENESS)

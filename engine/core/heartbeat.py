"""Ranks that are gone are noticed: one that was stopped, or whose machine or network is down, ends the others after a while,
where a collective would wait for half an hour; and workers whose launcher was killed are asked to stop.

Every rank watches the one after it, so the traffic is a few words per rank and beat, however many they are.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from torch.distributed import DistError, Store

BEAT = 5.0  # seconds between signs of life
SILENCE = 300.0  # seconds without one until a rank is given up: a compiler or a library may keep Python from its threads for long
LEAVING = 10.0  # seconds that the rank with the store waits for the others to leave
STATUS = 2  # as where a collective tells of it: 1 would say that the training is whole
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Heartbeat(threading.Thread):
    """Shows that this rank lives, and watches the next one.

    Args:
        store: of all ranks, which lies in rank 0's process; this thread's own connection.
        end: ends the process with a sentence; not called for ranks that left.
    """

    def __init__(self, store: Store, rank: int, world: int, end: Callable[[str], None]):
        super().__init__(daemon=True, name="heartbeat")
        self._store, self._rank, self._world, self._end = store, rank, world, end
        self._left = threading.Event()
        store.set(f"host-{rank}", socket.gethostname())

    def run(self) -> None:
        following, heard, beats = (self._rank + 1) % self._world, time.monotonic(), -1
        while not self._left.wait(BEAT):
            try:
                self._store.add(f"beats-{self._rank}", 1)
                seen = self._store.add(f"beats-{following}", 0)
                left, gone = self._store.add(f"left-{following}", 0), self._store.add("gone", 0)
            except DistError:
                if not self._left.is_set():
                    self._end("rank 0 is gone")
                return
            if seen != beats or left:
                heard, beats = time.monotonic(), seen
            if gone:
                self._end("another rank is gone")
            elif time.monotonic() - heard > SILENCE:
                self._store.add("gone", 1)
                host = (
                    self._store.get(f"host-{following}").decode() if self._store.check([f"host-{following}"]) else "?"
                )
                self._end(f"rank {following} on {host} has shown no sign of life for {SILENCE:.0f} s")

    def leave(self, store: Store) -> None:
        """Say that this rank goes, by the main thread's connection; rank 0 waits a little for the others."""
        self._left.set()
        try:
            store.add(f"left-{self._rank}", 1)
            until = time.monotonic() + LEAVING
            while self._rank == 0 and time.monotonic() < until:
                if all(store.add(f"left-{other}", 0) for other in range(self._world)):
                    return
                time.sleep(0.02)
        except DistError:  # rank 0 was faster
            pass


def end(sentence: str) -> None:
    """End this process, whatever its main thread waits for. What was saved is whole."""
    print(
        f"error: {sentence}; this run ends here, --resume goes on from its last checkpoint", file=sys.stderr, flush=True
    )
    os._exit(STATUS)


def stop_with_parent() -> None:
    """Let the system send SIGTERM to this process when the one that started it ends: a killed launcher leaves no workers."""
    parent = os.getppid()
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_DIES_WITH_PARENT, signal.SIGTERM) == 0:
        if os.getppid() != parent:  # it ended meanwhile
            os.kill(os.getpid(), signal.SIGTERM)

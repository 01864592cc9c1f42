"""Of two processes that train together one is killed, stopped or cut off: what becomes of the other, and whether both go on."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from engine.core.heartbeat import SILENCE
from engine.training import checkpoint
from tests.faults.results import Part
from tests.faults.runs import End, Ended, Server, Verdict, false_words, flags, images, left_over, logged, lost
from tests.ranks import group

BOUND = {"killed": 60.0, "cut off": 60.0, "stopped": SILENCE + 60.0}  # seconds in which the other has to end
STEP = 3  # that has to be logged before


class Pair:
    """Runs of two processes over gloo, and what an undisturbed one ends as."""

    def __init__(self, server: Server, scratch: Path, epochs: int = 12):
        """`epochs`: so many that one can be met in the middle."""
        self._server, self._scratch, self._count = server, scratch / "pairs", 0
        self._arguments = flags("mae", images(scratch / "images"), epochs=epochs)
        run = self.folder()
        self.seconds, ended = self._whole([*self._arguments, "--out", str(run)])
        if any(one.status != 0 for one in ended):
            raise RuntimeError(f"the undisturbed pair ended so: {ended}")
        self.end = End.of(run)

    def folder(self) -> Path:
        self._count += 1
        (self._scratch / str(self._count)).mkdir(parents=True)
        return self._scratch / str(self._count) / "run"

    def _start(self, arguments: Sequence[str]) -> list[int]:
        return [self._server.start(arguments, **told) for told in group(2)]

    def _whole(self, arguments: Sequence[str]) -> tuple[float, list[Ended]]:
        began = time.monotonic()
        ended = [self._server.wait(process) for process in self._start(arguments)]
        return time.monotonic() - began, ended

    def disturb(self, way: str, victim: int, part: Part) -> None:
        """Do it to one of the two in mid-run; see that the other ends, in time and with a sentence; go on with both."""
        run = self.folder()
        processes = self._start([*self._arguments, "--out", str(run)])
        until = time.monotonic() + 120
        # a checkpoint is written beside the steps: none may be whole yet
        while not (logged(run) >= STEP and checkpoint.newest_sound(run / "checkpoints")) and time.monotonic() < until:
            time.sleep(0.01)
        {"killed": _kill, "stopped": _stop, "cut off": _cut_off}[way](processes[victim])
        began = time.monotonic()
        survivor = self._server.wait(processes[1 - victim], BOUND[way])
        seconds, why, words = time.monotonic() - began, "", []
        if survivor is None:
            why = f"the other process still waits after {BOUND[way]:.0f} s"
        elif survivor.status == 0:
            why = "the other process ended as if nothing had been"
        else:
            words = false_words(run, survivor)
            part.notes.append(f"rank {victim} {way}: the other ended with {survivor.status} after {seconds:.1f} s")
        for process in processes if survivor is None else [processes[victim]]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            self._server.wait(process)
        verdict = Verdict(False, 0, words=words, why=why, outcome=way)
        verdict.lost = lost(run)
        _, again = self._whole(["--resume", str(run)])
        if any(one.status != 0 for one in again):
            verdict.why = f"{why}; --resume ended with {[one.status for one in again]}: {again[0].said[-200:]}"
        elif fault := self.end.difference(End.of(run)):
            verdict.why = f"{why}; {fault}"
        verdict.survived, verdict.left = not verdict.why, left_over(run)
        part.add(f"rank {victim} {way}", verdict)


def _kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def _stop(process: int) -> None:
    os.kill(process, signal.SIGSTOP)


def _cut_off(process: int) -> None:
    """Every connection of the process ends; it goes on itself. Its descriptors are taken over, as Linux allows."""
    pidfd = os.pidfd_open(process)
    try:
        for name in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/{process}/fd/{name}").startswith("socket:"):
                    descriptor = _taken(pidfd, int(name))
                    with socket.socket(fileno=descriptor) as taken:
                        if taken.family in (socket.AF_INET, socket.AF_INET6):
                            taken.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)


def _taken(pidfd: int, number: int) -> int:
    """pidfd_getfd, which Python lacks. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(438, pidfd, number, 0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor

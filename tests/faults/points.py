"""Every call that changes a file of a run is a fault point: the process dies there, or the call fails."""

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults.injected import Fault
from tests.faults.results import Part
from tests.faults.runs import Call, Subject

OF_DISKS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)


@dataclass(frozen=True)
class Point:
    """What is done at one call; `lasting`, to all calls from there on; of a lock that fails, the `lock`-th: another call, which a
    thread may put in its place, can't lack locks."""

    call: Call
    action: str
    error: int = 0
    lasting: bool = False
    lock: int = 0

    def __str__(self) -> str:
        what = os.strerror(self.error) + (" from there on" if self.lasting else "") if self.error else self.action
        return f"{self.call.kind} {self.call.number} ({self.call.place}, {self.call.file}): {what}"


def kills(calls: Sequence[Call]) -> list[Point]:
    """Between two calls the disk stays as it is, so one death before each call meets all states; a write has a state within. The
    rename that isn't seen comes after the last write of a file of safetensors."""
    found = []
    for call, following in zip(calls, [*calls[1:], None]):
        found.append(Point(call, "kill before"))
        if call.kind == "write":
            found.append(Point(call, "kill after half"))
            if call.file.startswith(".tmp") and (following is None or following.file != call.file):
                found.append(Point(call, "kill after"))
    return found


def errors(calls: Sequence[Call]) -> list[Point]:
    """Each call fails once, and then from there on; what it answers goes round."""
    found, locks = [], 0
    for number, call in enumerate(calls):
        locks += call.kind == "lock"
        if call.kind == "lock":
            found.append(Point(call, "fail", errno.ENOLCK, lock=locks))
        else:
            found.append(Point(call, "fail", OF_DISKS[number % len(OF_DISKS)]))
        found.append(Point(call, "fail", OF_DISKS[(number // 4) % len(OF_DISKS)], True))
    return found


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """At most `count` of them: first one of every kind of call in every place, then evenly over the run."""
    first = {(point.call.kind, point.call.place, point.action): point for point in reversed(points)}
    kinds = sorted(first.values(), key=lambda point: (point.call.place, point.call.kind, point.action))
    chosen = [kinds[i * len(kinds) // count] for i in range(count)] if len(kinds) > count else kinds
    rest = [point for point in points if point not in chosen]
    free = min(count - len(chosen), len(rest))
    return [*chosen, *(rest[i * len(rest) // free] for i in range(free))]


def fault_of(point: Point, subject: Subject, run: Path) -> Fault:
    """A lasting one meets every kind of call, as a full disk does."""
    if point.lock:
        return Fault([str(run), subject.cache(run)], "fail", ("lock",), point.error, point.lock, point.lock)
    last = 10**9 if point.lasting else point.call.number
    return Fault([str(run), subject.cache(run)], point.action, error=point.error, first=point.call.number, last=last)


def meet(
    subject: Subject, points: Sequence[Point], part: Part, progress: Callable[[Part, int, int, float], None]
) -> None:
    """Put each point into a run of its own, go on with it, and judge."""
    began = time.monotonic()
    for done, point in enumerate(points):
        run = subject.folder()
        ended = subject.begin(run, fault_of(point, subject, run))
        verdict = subject.judge(run, ended)
        if point.action.startswith("kill") and ended.status == 0:
            # the run made fewer calls than the first one did, so the point wasn't met
            verdict = replace(verdict, outcome="not met")
        part.add(f"{subject.method}: {point}", verdict)
        subject.clear(run)
        progress(part, done + 1, len(points), began)


def odd_file_systems(subject: Subject, part: Part) -> None:
    """A file system that has no locks, flushes no folders, or writes less than asked: the run ends well, and tells the first."""
    for name, fault in (
        ("no locks", Fault([], "fail", ("lock",), errno.ENOLCK, 1, 10**9)),
        ("folders that cannot be flushed", Fault([], "fail", ("flush",), errno.EINVAL, 1, 10**9, folders_only=True)),
        ("writes that do half", Fault([], "half", ("write",), 0, 1, 10**9)),
    ):
        run = subject.folder()
        ended = subject.begin(run, replace(fault, roots=[str(run)]))
        verdict = subject.judge(run, ended)
        if ended.status != 0:
            verdict = replace(
                verdict, survived=False, why=verdict.why or f"ended with {ended.status}: {ended.said[-200:]}"
            )
        if name == "no locks" and "has no locks" not in ended.said:
            verdict.words.append("does not say that there are no locks")
        part.add(f"{subject.method}: {name}", verdict)
        subject.clear(run)

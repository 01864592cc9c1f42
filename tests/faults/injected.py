"""The library that stands between a process and its calls that change files: how it is built, and what it is told."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import preloaded

SOURCE = Path(__file__).with_name("injected.cpp")
CHANGES = ("open", "write", "flush", "truncate", "rename", "unlink", "rmdir", "mkdir", "lock", "chmod")
CALLS = (*CHANGES, "read-open", "read")  # in the order of injected.cpp
ACTIONS = ("count", "kill before", "kill after", "kill after half", "fail", "half")


@dataclass(frozen=True)
class Fault:
    """What happens to calls on files under `roots`.

    Attributes:
        roots: folders, at most four, as absolute paths.
        action: one of `ACTIONS`; "half" writes or reads the half of what was asked, which POSIX allows.
        calls: the kinds that are counted and met.
        error: the errno of "fail".
        first, last: numbers of the calls that are met, from 1.
        one_in: instead of these, one call in so many, drawn from `seed`.
        folders_only: of flushes, those of folders.
        record: a file that gets a line a call: number, kind, path.
    """

    roots: Sequence[str]
    action: str = "count"
    calls: Sequence[str] = CHANGES
    error: int = 0
    first: int = 0
    last: int = 0
    one_in: int = 0
    seed: int = 0
    folders_only: bool = False
    record: str = ""


def build(folder: Path) -> Path:
    """The library, in `folder`, as of `tests.preloaded.build`."""
    return preloaded.build(SOURCE, folder)


def arm(fault: Fault) -> None:
    """From here on, in this process, into which the library was loaded."""
    calls = sum(1 << CALLS.index(call) for call in fault.calls)
    wide = ctypes.c_uint64
    ctypes.CDLL(None).faults_arm(
        "\n".join(fault.roots).encode(), ctypes.c_uint(calls), ACTIONS.index(fault.action), fault.error,
        ctypes.c_long(fault.first), ctypes.c_long(fault.last), wide(fault.seed), wide(fault.one_in), int(fault.folders_only),
        fault.record.encode(),
    )  # fmt: skip

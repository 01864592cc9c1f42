"""A folder has one owner while it is written: a lock, and beside it who holds it."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path

from engine.core import durable
from engine.core.errors import BadInput

NAME = ".lock"


@contextmanager
def owned(folder: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[int]:
    """Holds a folder, which is made if missing; gives the lock's descriptor. A process that inherits it holds the folder as well.

    What killed processes left half-written is removed first, but for folders below it that have had owners of their own.

    Args:
        folder: of a run or a study.
        say: told where the file system has no locks, so that nobody is kept away, and which folders are put back.

    Raises:
        BadInput: somebody else holds it (the sentence says who), or it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / NAME).open("a+")
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EAGAIN, EACCES):
                handle.seek(0)
                who = _who(handle.read())
                raise BadInput(
                    f"{folder} is at work: {who}; wait for it, stop it, or choose another folder."
                ) from error
            say(f"{folder} has no locks ({error.strerror}): take care that one process alone writes there")
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            handle.truncate(0)
            # past the buffer, which would be written again when it closes
            os.write(handle.fileno(), json.dumps(me).encode())
        except OSError as error:
            raise BadInput(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error
        _clear(folder, say)
        try:
            yield handle.fileno()
        finally:
            with suppress(OSError):  # of a disk that fails, the error itself tells
                handle.truncate(0)


def _clear(folder: Path, say: Callable[[str], None]) -> None:
    for place, below, _ in os.walk(folder):
        with suppress(OSError):  # it can't be listed, or is gone
            for back in durable.clear(Path(place)):
                say(f"{back} is back: a process was killed before it had replaced it")
        below[:] = [name for name in below if not Path(place, name, NAME).exists()]


def _who(written: str) -> str:
    try:
        by = json.loads(written)
        return f"process {by['process']} on {by['host']} has it since {by['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process has it"

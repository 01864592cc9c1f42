"""A folder has one owner while it is written: a lock, and beside it who holds it."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from pathlib import Path

from engine.core.errors import BadInput

NAME = ".lock"


@contextmanager
def owned(folder: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[int]:
    """Holds a folder, which is made if missing; gives the lock's descriptor. A process that inherits it holds the folder as well.

    Args:
        folder: of a run or a study.
        say: told where the file system has no locks; then nobody is kept away.

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
        handle.truncate(0)
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        handle.write(json.dumps(me))
        handle.flush()
        try:
            yield handle.fileno()
        finally:
            handle.truncate(0)


def _who(written: str) -> str:
    try:
        by = json.loads(written)
        return f"process {by['process']} on {by['host']} has it since {by['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process has it"

"""One process at a time works in a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.errors import BadInput


@contextmanager
def held(folder: Path, name: str, who: str) -> Iterator[int]:
    """Holds a folder, which is made if missing; gives the descriptor. A child that keeps it open, as a training of a study does,
    holds the folder as well: when the parent was killed, nobody begins again beside what it left behind.

    Args:
        name: what the user calls the folder, for messages: the flag and the path.
        who: else may be at work there, for messages.

    Raises:
        BadInput: somebody else holds it, or it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a")
    except OSError as error:
        raise BadInput(f"{name} cannot be written ({error.strerror}); choose another folder.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(f"{name} is at work: {who}; wait for it.") from error
        yield handle.fileno()

"""One study at a time in a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.errors import BadInput


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Holds the study's folder, which is made if missing; gives the descriptor, which a training process keeps open as well: a
    study that was killed is not begun again beside a training that it left behind.

    Raises:
        BadInput: somebody else holds it, or it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / ".lock").open("a")
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written ({error.strerror}); choose another folder.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(
                f"--out {out} is at work: another study, or a training that one left behind; wait for it."
            ) from error
        yield handle.fileno()

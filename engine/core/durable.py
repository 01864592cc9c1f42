"""Files and folders that are there whole or not at all: written aside, flushed to the disk, renamed into place."""

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

# what a full, read-only, slow or vanished disk answers; and a folder that somebody else removed or may write alone
_OF_DISKS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.EFBIG,
    errno.EHOSTDOWN, errno.EREMOTEIO,
)  # fmt: skip
_OF_FOLDERS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
_NO_FLUSHING = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of folders, as SMB and some network file systems

# What is written aside is hidden and has such a name: a file `.NAME.aside-RANDOM` with NAME's suffix; of a folder an empty file
# `.NAME.aside-RANDOM`, and beside it the new folder and the one that it replaces.
_NEW, _FORMER = "-new", "-former"
_ASIDE = re.compile(rf"(?P<lock>\.(?P<name>.+)\.aside-[a-z0-9_]{{8}})(?P<part>{_NEW}|{_FORMER}|\..*)?")


def flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut; where a file system can't do so with folders, the
    names are left to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSHING or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def storage_fault(error: Exception, folder: Path) -> str:
    """What is wrong with the disk that a folder lies on, or with the folder, in the system's words, if that is what an error is
    about; else nothing."""
    number = error.errno if isinstance(error, OSError) else None
    where = str(error.filename) if isinstance(error, OSError) else str(error)
    if isinstance(error, SafetensorError) and (told := re.search(r"\(os error (\d+)\)", where)):
        number = int(told[1])
    if number in _OF_DISKS or (number in _OF_FOLDERS and str(folder) in where):
        return os.strerror(number)
    return ""


def new_folder(stem: str) -> Path:
    """Make a folder that no other process takes for its own: STEM-DATE-TIME, or if that is there, with -2, -3, ... behind it."""
    stamp = Path(f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    folder, numbers = stamp, count(2)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = stamp.with_name(f"{stamp.name}-{next(numbers)}")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it: who reads `path` sees the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _aside(path, path.suffix) as aside:
        write(aside)
        aside.chmod(0o644)
        flush(aside)
        aside.replace(path)
    flush(path.parent)


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a new folder beside `folder`, then swap it in; an earlier `folder` is removed afterwards.

    A folder cannot be replaced in one call of the system: between two renames there is none of that name, and after a kill or a
    power cut just there the earlier one lies beside it, hidden, until `clear` or the next `write_folder` puts it back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear(folder.parent, folder.name)
    with _aside(folder) as lock:
        new, former = (lock.with_name(lock.name + part) for part in (_NEW, _FORMER))
        try:
            new.mkdir()
            new.chmod(0o755)
            fill(new)
            for path in (*new.rglob("*"), new):
                flush(path)
            if folder.exists():
                folder.rename(former)
            new.rename(folder)
            flush(folder.parent)
        except BaseException:
            if former.exists() and not folder.exists():
                former.rename(folder)
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)


@contextmanager
def _aside(path: Path, suffix: str = "") -> Iterator[Path]:
    """A new hidden file beside `path`. Where the file system has locks it holds one, which says that its maker lives."""
    while True:
        descriptor, name = tempfile.mkstemp(suffix, f".{path.name}.aside-", path.parent)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else `clear` came before the lock
            break
        os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(descriptor)


def clear(folder: Path, name: str = "") -> list[Path]:
    """Remove what killed processes left in a folder while they wrote `name` there, or anything; what a process writes that lives
    stays, and so does all where there are no locks to tell.

    Returns:
        Folders that had been taken away and not replaced yet, which are put back.
    """
    back = []
    for left in filter(None, map(_ASIDE.fullmatch, os.listdir(folder))):
        path, of, part = folder / left[0], folder / left["name"], left["part"]
        with suppress(OSError), _lock_of_dead(folder / left["lock"] if part in (_NEW, _FORMER) else path) as dead:
            if not dead or name not in ("", of.name):
                continue
            if part == _FORMER and not of.exists():
                path.rename(of)
                back.append(of)
            elif part in (_NEW, _FORMER):
                shutil.rmtree(path)
            else:
                path.unlink()
    return back


@contextmanager
def _lock_of_dead(path: Path) -> Iterator[bool]:
    """Whether nobody holds this lock, or it is gone; inside it is held here."""
    try:
        handle = path.open("r+")
    except FileNotFoundError:
        yield True
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True

"""Files and folders that are there whole or not at all: written aside, flushed to the disk, renamed into place."""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        aside.chmod(0o644)
        flush(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a new folder beside `folder`, then swap it in; an earlier `folder` is removed afterwards.

    A folder cannot be replaced in one call of the system: between two renames there is none of that name, and after a power
    cut just there the earlier one lies beside it, hidden, under a name that ends in "former".
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    former = aside.with_name(f"{aside.name}-former")
    try:
        aside.chmod(0o755)
        fill(aside)
        for path in (*aside.rglob("*"), aside):
            flush(path)
        if folder.exists():
            folder.rename(former)
        aside.rename(folder)
        flush(folder.parent)
    except BaseException:
        if former.exists() and not folder.exists():
            former.rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)

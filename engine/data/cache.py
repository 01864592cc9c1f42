"""The user's cache folder, a lock for processes that fill it at the same time, and sets of files that are written there once."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.core.json_text import parsed

MANIFEST = "manifest.json"
# what a damaged file, or none, provokes in numpy and zipfile
_OF_DAMAGE = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def folder() -> Path:
    """$TESSERA_CACHE, else $XDG_CACHE_HOME/tessera, else ~/.cache/tessera. Not created here."""
    if chosen := os.environ.get("TESSERA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tessera"


def home_of(name: str, files: Iterable[Path]) -> Path:
    """The folder for what is made from these files, known by path, size and modification time of each. Raises OSError."""
    key = hashlib.blake2b(digest_size=8)
    for path in files:
        status = path.stat()
        key.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return folder() / f"{name}-{key.hexdigest()}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock named after `path`, whose parent folder is made if missing.

    Raises:
        BadInput: the folder cannot be made or written, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_name(path.name + ".lock"), "a")  # noqa: SIM115 (closed below, after the lock is released)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise BadInput(
                f"the cache folder {path.parent} has no locks ({error.strerror}): set TESSERA_CACHE to one that has"
            ) from error
        yield


def arrays(home: Path, names: Sequence[str], make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """The arrays of these names in `home`, an .npz file below the cache that is written of what `make` gives the first time, and
    again where it is damaged.

    Raises:
        BadInput: the cache folder cannot be written; or whatever else than OSError `make` raises.
    """
    with locked(home):
        if (stored := read_arrays(home, names)) is not None:
            return stored
        try:
            made = make()
        except OSError as error:
            raise _unwritable(home.parent, error) from error
        write_arrays(home, made)
        return made


def read_arrays(home: Path, names: Sequence[str]) -> Mapping[str, np.ndarray] | None:
    """The arrays of these names in an .npz file below the cache; None where there is none, or a damaged one."""
    with suppress(*_OF_DAMAGE), np.load(home, allow_pickle=False) as stored:
        return {name: stored[name] for name in names}
    return None


def write_arrays(home: Path, made: Mapping[str, np.ndarray]) -> None:
    """Raises BadInput where the cache folder cannot be written."""
    try:
        write_file(home, lambda aside: np.savez(aside, **made))
    except OSError as error:
        raise _unwritable(home.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> BadInput:
    return BadInput(
        f"the cache folder {folder} cannot be written ({error.strerror}): set TESSERA_CACHE to one that can"
    )


def kept(home: Path, fill: Callable[[Path], object]) -> Path:
    """`home`, a folder below the cache that `fill` writes the first time; later only the sizes of its files are looked at.

    It appears at once, complete, also when several processes ask for it together. A damaged one is written again.

    Raises:
        BadInput: the cache folder cannot be written, or what `fill` raises.
    """
    if _complete(home):
        return home
    with locked(home):
        if not _complete(home):
            for left in home.parent.glob(f".{home.name}-*"):  # by a process that was killed
                shutil.rmtree(left)
            aside = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
            try:
                new = aside / "new"
                new.mkdir()
                fill(new)
                sizes = {str(path.relative_to(new)): path.stat().st_size for path in new.rglob("*") if path.is_file()}
                (new / MANIFEST).write_text(json.dumps(sizes))
                if home.exists():
                    home.rename(aside / "damaged")
                new.rename(home)
            except OSError as error:
                raise _unwritable(home.parent, error) from error
            finally:
                shutil.rmtree(aside)
    return home


def _complete(folder: Path) -> bool:
    try:
        sizes = parsed((folder / MANIFEST).read_text())
        return all(os.stat(folder / path).st_size == size for path, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # the last: JSON, but no object
        return False

"""The user's cache folder, a lock for processes that fill it at the same time, and sets of files that are written there once."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.errors import BadInput

MANIFEST = "manifest.json"


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
        BadInput: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_name(path.name + ".lock"), "a")  # noqa: SIM115 (closed below, after the lock is released)
    except OSError as error:
        raise BadInput(
            f"the cache folder {path.parent} cannot be written ({error.strerror}): set TESSERA_CACHE to one that can"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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
                raise BadInput(
                    f"the cache folder {home.parent} cannot be written ({error.strerror}): set TESSERA_CACHE to one that can"
                ) from error
            finally:
                shutil.rmtree(aside)
    return home


def _complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all(os.stat(folder / path).st_size == size for path, size in sizes.items())
    except (OSError, ValueError):
        return False

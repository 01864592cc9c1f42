"""Which images archives hold, and where: found out once, then kept in the cache.

An index is known by the path, size and modification time of every archive: another one is made as soon as one of these differs.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from engine.core.errors import BadInput
from engine.data import cache
from engine.data.names import Names
from engine.data.stored import Ranges

VERSION = 1  # rises when archives are read otherwise, so that an old index is not taken for a new one
ARRAYS = ("text", "ends", "archive", "start", "size", "codes", "word_text", "word_ends")
NONE = -1  # of an image without a class


@dataclass(frozen=True)
class Part:
    """What some archive adds to an index: n images.

    Attributes:
        paths: what to call them.
        places: int64 [n, 2], where they start in the file, and their sizes, in bytes.
        codes: int64 [n], the place of their class in `words`, or NONE.
        words: classes.
    """

    paths: Names
    places: np.ndarray
    codes: np.ndarray
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Index:
    """All images of a split, n, in the order in which they were found.

    Attributes:
        paths: what to call them.
        ranges: where they lie.
        codes: int64 [n], the place of their class in `words`, or NONE.
        words: classes, as the archives call them.
    """

    paths: Names
    ranges: Ranges
    codes: np.ndarray
    words: tuple[str, ...]


def kept(files: Sequence[Path], what: str, read: Callable[[np.ndarray], Iterable[tuple[int, Part]]]) -> Index:
    """The index of these archives, from the cache where they were read before.

    Args:
        what: how they are read, part of what the index is known by.
        read: given sizes and modification times, int64 [files, 2], gives (place of the file, what it holds), in order.

    Raises:
        BadInput: an archive or the cache is not there; or what `read` raises.
    """
    key = hashlib.blake2b(f"{VERSION}\0{what}\0".encode("utf-8", "surrogateescape"), digest_size=16)
    stamps = np.empty((len(files), 2), np.int64)
    for place, path in enumerate(files):
        try:
            status = path.stat()
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error
        stamps[place] = status.st_size, status.st_mtime_ns
        key.update(f"{path}\0".encode("utf-8", "surrogateescape"))
    key.update(stamps)
    home = cache.folder() / "shards" / f"{key.hexdigest()}.npz"
    stored = cache.arrays(home, ARRAYS, lambda: _arrays(read(stamps)))
    ranges = Ranges(tuple(map(str, files)), stamps, stored["archive"], stored["start"], stored["size"])
    words = tuple(Names(stored["word_text"], stored["word_ends"]))
    return Index(Names(stored["text"], stored["ends"]), ranges, stored["codes"], words)


@contextmanager
def opened(path: Path, stamp: Sequence[int]) -> Iterator[int]:
    """A descriptor of an archive. Raises BadInput where it cannot be read, or at the end has not the size and time it had."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    try:
        yield file
        status = os.fstat(file)
        if (status.st_size, status.st_mtime_ns) != tuple(stamp):
            raise BadInput(f"{path} was written while it was read: start again when it is whole")
    finally:
        os.close(file)


def shown(parts: Iterable[Part], total: int) -> Iterable[Part]:
    """The same, with a bar in a terminal: a large set takes minutes, once."""
    console = Console(stderr=True)
    return track(parts, "listing archives", total, console=console, transient=True, disable=not console.is_terminal)


def _arrays(parts: Iterable[tuple[int, Part]]) -> dict[str, np.ndarray]:
    words: dict[str, int] = {}
    archives, codes, places = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]

    def paths() -> Iterable[str]:
        for archive, part in parts:
            code_of = np.array([NONE, *(words.setdefault(word, len(words)) for word in part.words)], np.int64)
            codes.append(code_of[part.codes + 1])
            places.append(part.places)
            archives.append(np.full(len(part.codes), archive, np.int32))
            yield from part.paths

    names = Names.of(paths())
    starts, sizes = np.concatenate(places).T
    if len(np.unique(np.fromiter(map(hash, names), np.int64, len(names)))) < len(names):  # a set of them would be large
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise BadInput(f"{count} images are called {name!r} in the archives; each needs a name of its own")
    vocabulary = Names.of(words)
    return {
        "text": names.text, "ends": names.ends, "codes": np.concatenate(codes), "archive": np.concatenate(archives),
        "start": starts.copy(), "size": sizes.copy(), "word_text": vocabulary.text, "word_ends": vocabulary.ends,
    }  # fmt: skip

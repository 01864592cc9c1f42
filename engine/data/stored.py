"""Where the encoded bytes of images lie: a file for each, or ranges of larger files (shards), which are read in place."""

import errno
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np


@dataclass(frozen=True)
class Ranges:
    """Where each of n images lies.

    Attributes:
        files: absolute paths.
        stamps: int64 [files, 2], their sizes in bytes and modification times in ns when they were listed.
        file: int32 [n], the index of the file.
        start, size: int64 [n], in bytes.
    """

    files: tuple[str, ...]
    stamps: np.ndarray
    file: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def take(self, ids: np.ndarray) -> "Ranges":
        """Those of some images."""
        return replace(self, file=self.file[ids], start=self.start[ids], size=self.size[ids])

    def open(self, index: int) -> BinaryIO:
        """One image, as a file that ends where it ends. Raises OSError, also where the file is another one by now."""
        return io.BufferedReader(_Section(self._opened(index), int(self.start[index]), int(self.size[index])))

    def read(self, index: int) -> np.ndarray:
        """uint8 [bytes] of one image. Raises OSError, also where the file is another one by now."""
        descriptor = self._opened(index)
        try:
            data = np.empty(int(self.size[index]), np.uint8)
            done, start = 0, int(self.start[index])
            while done < len(data):
                got = os.preadv(descriptor, [data[done:]], start + done)
                if not got:
                    raise OSError(errno.EIO, "the shard ends before the image does")
                done += got
            return data
        finally:
            os.close(descriptor)

    def _opened(self, index: int) -> int:
        # opened for each image, as image files are: nothing has to be kept, closed or shared between threads
        place = self.file[index]
        descriptor = os.open(self.files[place], os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != tuple(self.stamps[place]):
            os.close(descriptor)
            raise OSError(errno.ESTALE, "the shard was changed since it was listed")
        return descriptor


def _open_file(path: str, flags: int) -> int:
    """Opens a regular file only: a pipe would be waited for, and some devices have no end. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return descriptor


class _Section(io.RawIOBase):
    """A range of a file, as a file; owns the descriptor."""

    def __init__(self, descriptor: int, start: int, size: int):
        self._descriptor, self._start, self._size, self._place = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if place < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._place = place
        return place

    def readinto(self, buffer: memoryview) -> int:
        room = max(0, min(len(buffer), self._size - self._place))
        got = os.preadv(self._descriptor, [memoryview(buffer)[:room]], self._start + self._place) if room else 0
        self._place += got
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class Stored:
    """Images in order, and how the encoded bytes of each are had.

    Attributes:
        root: folder that the paths are relative to.
        paths: n names, each a file below the root, unless there are
        ranges: where they lie instead; a path then is a name only.
    """

    root: Path
    paths: Sequence[str]
    ranges: Ranges | None

    def open(self, index: int) -> BinaryIO:
        """The encoded image, to be read and closed. Raises OSError."""
        if self.ranges is not None:
            return self.ranges.open(index)
        return open(f"{self.root}/{self.paths[index]}", "rb", opener=_open_file)

    def read(self, index: int) -> np.ndarray:
        """uint8 [bytes], the encoded image. Raises OSError."""
        if self.ranges is not None:
            return self.ranges.read(index)
        with self.open(index) as file:
            return np.frombuffer(file.read(), np.uint8)

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and modification time in ns (a shard's own) of an image. Raises OSError."""
        if self.ranges is not None:
            return int(self.ranges.size[index]), int(self.ranges.stamps[self.ranges.file[index], 1])
        status = os.stat(f"{self.root}/{self.paths[index]}")
        return status.st_size, status.st_mtime_ns

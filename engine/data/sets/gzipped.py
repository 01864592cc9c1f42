"""A few files of a .tar.gz, into memory: nothing is unpacked to the disk, and nothing grows beyond what the archive can hold."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.core.errors import BadInput


@dataclass(frozen=True)
class Limits:
    """What the archives of a set never reach.

    Attributes:
        set: its name, for messages.
        file: bytes of a file.
        unpacked: bytes of the whole archive.
    """

    set: str
    file: int
    unpacked: int


def read(archive: Path, wanted: Mapping[str, str], limits: Limits) -> dict[str, bytes]:
    """The contents of some members; others are passed over.

    Args:
        wanted: names of members, and the key of each in what is returned.

    Raises:
        BadInput: the archive is damaged, lacks one, has one twice or as a link, or is larger than the limits.
    """
    found: dict[str, bytes] = {}
    try:
        with (
            gzip.open(archive) as stream,
            tarfile.open(fileobj=_Bounded(stream, archive, limits), mode="r|") as tar,
        ):
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None:
                    continue
                if not member.isreg() or name in found:
                    raise BadInput(f"{archive} has {member.name} as something else than one regular file")
                if member.size > limits.file:
                    raise BadInput(
                        f"{archive} has {member.name} with {member.size} bytes, more than any file of {limits.set}"
                    )
                found[name] = tar.extractfile(member).read()
                if len(found) == len(wanted):
                    return found
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise BadInput(f"{archive} is no whole .tar.gz: {error}") from error
    missing = next(path for path, name in wanted.items() if name not in found)
    raise BadInput(f"{archive} has no {missing}")


class _Bounded(io.RawIOBase):
    """An unpacked stream that ends in BadInput where it grows beyond the limit."""

    def __init__(self, stream: gzip.GzipFile, path: Path, limits: Limits):
        self.stream, self.path, self.limits, self.left = stream, path, limits, limits.unpacked

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise BadInput(
                f"{self.path} unpacks to more than {self.limits.unpacked >> 20} MiB, which no archive of {self.limits.set} does"
            )
        return data

"""What a tar archive holds and where, without unpacking anything; whatever could not be read in place is refused.

Read are the forms of POSIX (ustar and pax) and GNU, long names included. Python's `tarfile` stops without a word at a damaged
header and at a torn end, and takes sizes as they are declared; here all of that is refused, and every byte is accounted for.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from engine.core.errors import BadInput

BLOCK = 512
CHUNK = 4096  # bytes read at a time: a header, and often the small member behind it
LONGEST_NAME = 4096  # bytes
LARGEST_HEADER = 1 << 20  # bytes of a pax header
REGULAR = (b"0", b"\0", b"7")
FOLDER = b"5"
GNU_NAME, GNU_LINK = b"L", b"K"
PAX, PAX_OF_ALL = (b"x", b"X"), b"g"
REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file",
}  # fmt: skip
COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip


class Member(NamedTuple):
    """A regular file in an archive: its name, and where it lies in the file that holds the archive, in bytes."""

    name: str
    start: int
    size: int


class Archive:
    """A tar in an open file, or one that is itself a member of a tar there.

    Args:
        file: a descriptor; its position is left alone.
        where: what to call the archive in messages.
        start, end: where it lies in the file; by default it is the file.
    """

    def __init__(self, file: int, where: str, start: int = 0, end: int | None = None):
        self.file, self.where, self._start = file, where, start
        self._end = os.fstat(file).st_size if end is None else end
        self._chunk, self._chunk_start = b"", 0

    def read(self, start: int, size: int) -> bytes:
        """So many bytes from there; fewer at the end of the file. Raises BadInput where the disk fails."""
        place = start - self._chunk_start
        if place < 0 or place + size > len(self._chunk):
            try:
                self._chunk = os.pread(self.file, max(size, CHUNK), start)
            except OSError as error:
                raise BadInput(f"{self.where} cannot be read: {error.strerror}") from error
            self._chunk_start, place = start, 0
        return self._chunk[place : place + size]

    def members(self) -> Iterator[Member]:
        """The regular files in order; folders are passed over.

        Raises:
            BadInput: the archive is compressed, torn or no tar; or a member is a link, a device or sparse, has a name that leads
                out of the archive or is there twice, or is declared larger than what is there.
        """
        place, seen = self._start, set()
        given: dict[str, bytes] = {}  # what headers say of the member behind them
        while True:
            header = self.read(place, BLOCK) if self._end - place >= BLOCK else b""
            if len(header) < BLOCK and place == self._start:
                self._refuse_start()
            if len(header) < BLOCK:
                self._refuse("is torn: it stops before the mark that ends a tar")
            if not header.strip(b"\0"):
                if given:
                    self._refuse("is damaged: a header stands before nothing")
                self._check_end(place)
                return
            self._check_sum(header, place)
            kind, size = header[156:157], self._number(header[124:136], place)
            name = given.get("path", _name(header))
            if "size" in given and kind not in (*PAX, PAX_OF_ALL, GNU_NAME, GNU_LINK):
                size = self._declared(given["size"], name)
            data = place + BLOCK
            if kind == FOLDER or (kind in REGULAR and name.endswith(b"/")):
                self._checked(name)
                given, place = {}, data
                continue
            if size > self._end - data:
                self._refuse(f"is torn or damaged: {_shown(name)} is declared to have {size} bytes, beyond its end")
            if kind in (*PAX, PAX_OF_ALL, GNU_NAME, GNU_LINK):
                self._extend(given, kind, data, size)
            else:
                text = self._checked(name)
                sparse = any(key.startswith("GNU.sparse") for key in given)
                if kind not in REGULAR or sparse:
                    what = REFUSED[b"S"] if sparse else REFUSED.get(kind, f"of the unknown kind {kind!r}")
                    self._refuse(f"holds {_shown(name)}, which is {what}: only regular files can be read in place")
                if text in seen:
                    self._refuse(f"holds {_shown(name)} twice")
                seen.add(text)
                given = {}
                yield Member(text, data, size)
            place = data + -(-size // BLOCK) * BLOCK

    def _extend(self, given: dict[str, bytes], kind: bytes, start: int, size: int) -> None:
        """Notes what a header says of the member behind it; of two headers the first counts, as in Python's reader."""
        if size > LARGEST_HEADER:
            self._refuse(f"has a header of {size} bytes before a member, more than any name needs")
        body = self.read(start, size)
        if kind == GNU_NAME:
            given.setdefault("path", body.partition(b"\0")[0])
        elif kind != GNU_LINK:
            found = self._records(body)
            if kind == PAX_OF_ALL:
                if wrong := [key for key in found if key in ("path", "size") or key.startswith("GNU.sparse")]:
                    self._refuse(f"has a header that gives all members one {wrong[0]}")
                return
            for key, value in found.items():
                given.setdefault(key, value)

    def _records(self, body: bytes) -> dict[str, bytes]:
        """Of a pax header: lines "LENGTH KEY=VALUE"."""
        found, place = {}, 0
        while place < len(body) and body[place]:
            digits, space, _ = body[place : place + 20].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            record = body[place : place + length]
            key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
            if len(record) < length or not equals or record[-1:] != b"\n":
                self._refuse("has a damaged pax header")
            found[key.decode("utf-8", "surrogateescape")] = value
            place += length
        return found

    def _declared(self, digits: bytes, name: bytes) -> int:
        if not digits.isdigit() or len(digits) > 20:
            self._refuse(f"declares {digits[:40]!r} as the size of {_shown(name)}")
        return int(digits)

    def _number(self, field: bytes, place: int) -> int:
        """A size: octal digits, or in GNU's form 11 bytes behind one that says so."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.partition(b"\0")[0].strip()
        try:
            if digits and not digits.isdigit():
                raise ValueError
            return int(digits or b"0", 8)
        except ValueError:
            self._refuse(f"is damaged: the header at byte {place} declares no size")

    def _check_sum(self, header: bytes, place: int) -> None:
        digits = header[148:156].partition(b"\0")[0].strip()
        total = sum(header) - sum(header[148:156]) + 8 * 32
        if not digits.isdigit() or digits.translate(None, b"01234567") or int(digits, 8) != total:
            if place > self._start:
                self._refuse(f"is torn or damaged: there is no header at byte {place}, where one belongs")
            self._refuse_start()

    def _check_end(self, place: int) -> None:
        """Behind the mark only zeros may follow; `cat` of two archives has the second there, which no reader would see."""
        while place < self._end:
            part = self.read(place, min(1 << 16, self._end - place))
            if not part or part.strip(b"\0"):
                self._refuse(
                    "goes on behind the mark that ends it: was it written twice, or put together from several?"
                )
            place += len(part)

    def _checked(self, name: bytes) -> str:
        if not name or b"\0" in name or len(name) > LONGEST_NAME:
            self._refuse(f"holds a member that is named {_shown(name)}")
        if name.startswith(b"/") or b".." in name.split(b"/"):
            self._refuse(f"holds {_shown(name)}, whose name leads out of the archive")
        return name.decode("utf-8", "surrogateescape").removeprefix("./")

    def _refuse_start(self) -> NoReturn:
        start = self.read(self._start, min(BLOCK, self._end - self._start))
        packer = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
        self._refuse(
            f"is compressed by {packer}, and cannot be read in place: unpack it to a .tar" if packer else "is no tar"
        )

    def _refuse(self, what: str) -> NoReturn:
        raise BadInput(f"{self.where} {what}")


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        return prefix + b"/" + name
    return name


def _shown(name: bytes) -> str:
    return repr(name[:200].decode("utf-8", "backslashreplace"))

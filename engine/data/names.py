"""Many strings in little memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

ENCODED = ("utf-8", "surrogateescape")  # so that names of files that are no UTF-8 come back as they were
PART = 1 << 14


class Names(Sequence[str]):
    """n strings, kept as one block of bytes: each takes its characters and 8 bytes, a Python string about 60 more.

    Attributes:
        text: uint8, all of them one behind the other, UTF-8.
        ends: int64 [n], where each ends.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Goes through the names once. Raises UnicodeEncodeError for one that no file can have."""
        text, lengths = bytearray(), []
        sizes = [np.empty(0, np.int64)]
        for name in names:
            encoded = name.encode(*ENCODED)
            text += encoded
            lengths.append(len(encoded))
            if len(lengths) == PART:
                sizes.append(np.array(lengths, np.int64))
                lengths = []
        sizes.append(np.array(lengths, np.int64))
        return cls(np.frombuffer(bytes(text), np.uint8), np.cumsum(np.concatenate(sizes)))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """One string, or the list that a slice has."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = self.ends[place - 1] if place else 0
        return self.text[start : self.ends[place]].tobytes().decode(*ENCODED)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for part in range(0, len(self), PART):
            ends = self.ends[part : part + PART]
            text = self.text[start : ends[-1]].tobytes()
            before = 0
            for end in (ends - start).tolist():
                yield text[before:end].decode(*ENCODED)
                before = end
            start = int(ends[-1])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)
        if isinstance(other, (list, tuple)):
            return len(self) == len(other) and all(one == name for one, name in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None

"""MATLAB files up to version 7: arrays of numbers, as SVHN and Flowers-102 have them, and of structs, as ImageNet has them.

scipy's reader is C, and some damaged files make it crash: so it runs in a process of its own, this module as a command.
"""

import json
import math
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.errors import BadInput

NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "single", "double")
DEFLATE = 1032  # the most that zlib makes of a byte
HEADER, COMPRESSED = 128, 15  # bytes before the first element; the type of one that zlib packed
UNPACKED = 1 << 26  # bytes of structs; ImageNet's have a few


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is one sentence about the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing") from error
    except NotImplementedError as error:
        raise BadInput(f"{path} is of MATLAB's version 7.3: save it with -v7") from error
    except BadInput:
        raise
    except Exception as error:  # the reader raises anything on hostile bytes; whatever it is, the file is no good
        raise BadInput(
            f"{path} is no MATLAB file that can be read: {str(error)[:200] or type(error).__name__}"
        ) from error


def read(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of these names. What the file declares is held against its size before anything is unpacked.

    Raises:
        BadInput: the file or one of the arrays is missing, damaged, or holds something else than numbers.
    """
    with np.load(BytesIO(_apart("arrays", path, *names)), allow_pickle=False) as found:
        return [found[name] for name in names]


def _read(path: Path, *names: str) -> dict[str, np.ndarray]:
    from scipy import io  # wanted once

    size = path.stat().st_size
    declared = {name: (shape, kind) for name, shape, kind in io.whosmat(path, appendmat=False)}
    for name in names:
        shape, kind = declared.get(name, ((), "nothing"))
        if kind not in NUMBERS:
            raise BadInput(f"{path} holds {kind} as {name!r}, where an array of numbers belongs")
        if math.prod(shape) > DEFLATE * size:
            raise BadInput(
                f"{path} declares more for {name!r} than its {size} bytes can hold: it is cut off or damaged"
            )
    found = io.loadmat(path, variable_names=names, appendmat=False)
    return {name: np.asarray(found[name]) for name in names}


def whole(path: Path, name: str, values: np.ndarray, low: int, high: int) -> np.ndarray:
    """The values in one row, int64. Raises BadInput unless they are whole numbers from `low` to `high`."""
    row = values.ravel()
    outside = row[~((row >= low) & (row <= high) & (row == np.floor(row)))]
    if len(outside) or not len(row):
        found = f"{outside[0]:g}" if len(outside) else "nothing"
        raise BadInput(f"{path} holds {found} in {name!r}, where whole numbers from {low} to {high} belong")
    return row.astype(np.int64)


def read_records(path: Path, content: bytes, name: str, *fields: str) -> list[tuple[Any, ...]]:
    """The values of these fields of an array of structs, as devkits have them: numbers and texts, in order.

    Args:
        path: what to call the content in messages.
        content: of a file up to version 7; it may not unpack to more than 64 MiB.

    Raises:
        BadInput: the content is damaged, or holds something else.
    """
    return list(map(tuple, json.loads(_apart("records", path, name, *fields, content=content))))


def _read_records(path: Path, content: bytes, name: str, *fields: str) -> list[tuple[Any, ...]]:
    from scipy import io  # wanted once

    unpacked = _unpacked(content)
    declared = {name: (shape, kind) for name, shape, kind in io.whosmat(BytesIO(unpacked))}
    shape, kind = declared.get(name, ((), "nothing"))
    if kind != "struct" or math.prod(shape) > len(unpacked):
        raise BadInput(f"{path} holds {kind} {list(shape)} as {name!r}, where an array of structs belongs")
    found = np.atleast_1d(io.loadmat(BytesIO(unpacked), variable_names=[name], squeeze_me=True)[name])
    if missing := [field for field in fields if field not in (found.dtype.names or ())]:
        raise BadInput(f"{path} has no {missing[0]} in {name!r}")
    return list(zip(*(found[field].tolist() for field in fields), strict=True))


def _unpacked(content: bytes) -> bytes:
    """The same file with nothing compressed in it. Its elements have a type and a length before them, as the format has it."""
    order = "<" if content[126:128] == b"IM" else ">"
    parts, place, room = [content[:HEADER]], HEADER, UNPACKED
    while place + 8 <= len(content):
        kind, length = struct.unpack_from(f"{order}II", content, place)
        element = content[place : place + 8 + length]
        if kind == COMPRESSED:
            unpacking = zlib.decompressobj()
            element = unpacking.decompress(element[8:], room)
            if unpacking.unconsumed_tail:
                raise ValueError(f"it unpacks to more than {UNPACKED >> 20} MiB")
        parts.append(element)
        room -= len(element)
        if room <= 0:
            raise ValueError(f"it unpacks to more than {UNPACKED >> 20} MiB")
        place += 8 + length
    return b"".join(parts)


def _apart(kind: str, path: Path, *words: str, content: bytes | None = None) -> bytes:
    """What the command below prints; the content is its standard input. Raises BadInput where it says so, or crashed."""
    found = subprocess.run(
        [sys.executable, "-m", __name__, kind, path, *words],
        input=content, stdin=subprocess.DEVNULL if content is None else None, capture_output=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    if found.returncode == 2:
        raise BadInput(found.stderr.decode().strip())
    if found.returncode:
        raise BadInput(f"{path} is no MATLAB file that can be read: it is damaged, its reader crashed on it")
    return found.stdout


def main(kind: str, path: Path, *words: str) -> int:
    """Print arrays as .npz, or records as JSON; or a sentence, with status 2."""
    try:
        with _reading(path):
            if kind == "arrays":
                np.savez(sys.stdout.buffer, **_read(path, *words))
            else:
                print(json.dumps(_read_records(path, sys.stdin.buffer.read(), *words)))
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))

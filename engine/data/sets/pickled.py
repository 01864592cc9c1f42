"""Pickle files from elsewhere, read without running anything: dict, list, bytes, text, numbers, numpy arrays, as CIFAR has them.

Unpickling calls whatever the file names. Here a file may name only what pickled arrays name, and gets stand-ins for it: none of
numpy's own code sees the file's values before they are checked. What a file declares (memo places, array sizes) is held against
its size, so that a small one cannot ask for much memory. As with encoding="bytes", text of Python 2 becomes bytes.
"""

import io
import math
import pickle
import pickletools
import re

import numpy as np

from engine.core.errors import BadInput

OPERATIONS = frozenset(
    """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING
    SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_DICT DICT SETITEM
    SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET
    LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD""".split()
)
NUMBERS = re.compile(r"[uif][1248]|b1")  # numpy's short names of types that hold nothing but numbers


def load(data: bytes, file: str) -> dict:
    """The dict that a pickle holds; arrays among its values are read-only views of the data.

    Args:
        data: the whole file.
        file: its name, for messages.

    Raises:
        BadInput: the file names anything else than arrays are made of, is damaged, or holds no dict.
    """
    try:
        _scan(data)
        found = _Unpickler(data).load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError("it holds no dict")
        return {key: value.array() if isinstance(value, _Array) else value for key, value in found.items()}
    except _Refused as error:
        raise BadInput(
            f"{file} is refused: it asks for {_shown(error)}, and only numpy arrays are rebuilt from a pickle"
        ) from None
    except Exception as error:  # hostile bytes make an unpickler raise anything; whatever it is, the file is no good
        raise BadInput(f"{file} is no pickle that can be read: {_shown(error) or type(error).__name__}") from None


def _shown(error: Exception) -> str:
    """One short line, whatever a hostile file put into it."""
    return " ".join(ascii(str(error))[1:-1].split())[:200]


class _Refused(Exception):
    """Names what a file asked for."""


def _scan(data: bytes) -> None:
    """Look at the operations before any is carried out."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name in ("GLOBAL", "INST"):
            _known(*str(argument).split(" ", 1))
        if operation.name not in OPERATIONS:
            raise _Refused(f"the operation {operation.name}")
        if operation.name.endswith("PUT") and argument > count:  # the memo is as long as its highest place
            raise _Refused(f"place {argument} of a memo that holds {count} values at most")


def _known(module: str, name: str) -> str:
    if f"{module}.{name}" not in GLOBALS:
        raise _Refused(f"{module}.{name}")
    return f"{module}.{name}"


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.left = len(data)

    def find_class(self, module: str, name: str) -> object:
        stand_in = GLOBALS[_known(module, name)]
        return _Call(self.encode) if stand_in is None else stand_in

    def encode(self, text: str, encoding: str | bytes) -> bytes:
        """What Python 3 writes bytes as for Python 2."""
        if encoding not in ("latin1", b"latin1"):
            raise _Refused(f"the codec {encoding!r:.40}")
        self.left -= len(text)
        if self.left < 0:  # one text of the file, encoded again and again
            raise _Refused("more bytes than it has")
        return text.encode("latin1")


class _Sealed:
    """A file may neither give it attributes nor a state."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise _Refused("a state for something that has none")


class _Call(_Sealed):
    __slots__ = ("act",)

    def __init__(self, act):
        self.act = act

    def __call__(self, *arguments):
        return self.act(*arguments)


class _Type:
    """Stands in for numpy.dtype."""

    __slots__ = ("code", "order")

    def __init__(self, code: str | bytes, align: object = False, copy: object = False):
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not NUMBERS.fullmatch(code):
            raise _Refused(f"an array of type {code!r:.40}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        _, order, *parts = state
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "=", "|") or any(part is not None for part in parts[:3]):
            raise _Refused("an array of parts that are no plain numbers")
        self.order = order

    def dtype(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """Stands in for the numpy.ndarray that is being rebuilt."""

    __slots__ = ("state",)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, raw = state
        if not isinstance(kind, _Type) or not isinstance(raw, bytes):
            raise _Refused("an array of objects")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise _Refused("an array without a shape")
        if math.prod(shape) * kind.dtype().itemsize != len(raw):
            raise _Refused(f"an array of other size than its {len(raw)} bytes")
        self.state = tuple(shape), kind.dtype(), bool(fortran), raw

    def array(self) -> np.ndarray:
        shape, dtype, fortran, raw = self.state
        return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _NDARRAY or shape != (0,):
        raise _Refused("an array that is none of numpy's own")
    return _Array()


_NDARRAY = _Sealed()
GLOBALS = {
    "numpy.core.multiarray._reconstruct": _Call(_reconstruct),
    "numpy._core.multiarray._reconstruct": _Call(_reconstruct),
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _Type,
    "_codecs.encode": None,
}
"""What a file may name, and what it gets instead; the codec belongs to each load, which counts what it gives."""

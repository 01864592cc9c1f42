"""Another processor than this one, as libraries see it that choose their code by what it can do: AMD's Zen 2, without AVX-512."""

import ctypes
import platform
from pathlib import Path

from tests import preloaded

SOURCE = Path(__file__).with_name("processor.cpp")
_ARCH_PRCTL, _SET_CPUID, _ALLOWED = 158, 0x1012, 1  # of Linux on x86-64


def can_be_stood_in_for() -> bool:
    """Whether `cpuid` can be made to fault here, which takes the processor (Intel since 2012) and the kernel, and g++."""
    if platform.machine() != "x86_64" or not preloaded.can_be_built():
        return False
    # what is asked for is what holds already; it is refused where the other cannot be had
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _SET_CPUID, _ALLOWED) == 0


def build(folder: Path) -> Path:
    """The library that stands in for it, as of `tests.preloaded.build`."""
    return preloaded.build(SOURCE, folder)

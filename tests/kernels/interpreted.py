"""What the tests of Triton's kernels share with those of all implementations.

Triton's run on a GPU where there is one, and in the interpreter elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from tests.kernels.agreement import HALF_AND_FULL

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
MARKS = [pytest.mark.gpu] if HAS_GPU else []
# the interpreter's matrix product of bf16 is wrong
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def place(implementation: str, device: str, *dtype: torch.dtype):
    needs_gpu = device == "cuda" or (implementation == "triton" and torch.bfloat16 in dtype)
    return pytest.param(implementation, device, *dtype, marks=[pytest.mark.gpu] if needs_gpu else [])


# each implementation of an op that has both, on the devices that it runs on; the second with the dtypes that it takes
IMPLEMENTATION_AND_DEVICE = [place("reference", "cpu"), place("reference", "cuda"), place("triton", DEVICE)]
IMPLEMENTATION_DEVICE_DTYPE = [
    place(*at.values, dtype)
    for at in IMPLEMENTATION_AND_DEVICE
    for dtype in HALF_AND_FULL
    if at.values[0] == "reference" or dtype != torch.float64
]


def moved(arguments: Sequence, device: str) -> list:
    """The arguments with every tensor of the CPU on `device`; those that are on another stay there."""
    return [x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x for x in arguments]


@contextmanager
def poisoned_memory() -> Iterator[list[int]]:
    """New tensors hold NaN or a senseless number until they are written; yields the list of their numbers of bytes."""
    new_empty, sizes = torch.Tensor.new_empty, []

    def poisoned(tensor, *arguments, **options):
        new = new_empty(tensor, *arguments, **options)
        sizes.append(new.nbytes)
        return new.fill_(torch.nan if new.is_floating_point() else -7)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield sizes

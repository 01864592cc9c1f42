"""What the tests of Triton's kernels share: they run on a GPU where there is one, and in the interpreter elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
MARKS = [pytest.mark.gpu] if HAS_GPU else []
# the interpreter's matrix product of bf16 is wrong
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


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

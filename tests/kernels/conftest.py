"""Every kernel test draws the same numbers each time, and leaves the choice of implementation as it found it.

Where no GPU is, Triton's kernels run in its interpreter, on CPU tensors.
"""

import importlib

import pytest
import torch

import kernels
from kernels.choice import AVAILABLE

with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    # whether a function is interpreted is settled when it is defined
    for op, exist in AVAILABLE.items():
        if "triton" in exist:
            importlib.import_module(f"kernels.{op}.triton")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _choice_restored():
    yield
    kernels.use("auto")

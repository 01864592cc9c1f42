"""Every kernel test draws the same numbers each time, has values checked, and leaves the choice of implementation as
it found it.
"""

import pytest
import torch

import kernels


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _debug_mode():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_DEBUG", "1")
        yield


@pytest.fixture(autouse=True)
def _choice_restored():
    yield
    kernels.use("auto")

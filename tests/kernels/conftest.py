"""Every kernel test draws the same numbers each time, has values checked, and leaves the choice of implementation as
it found it.
"""

import fcntl
import os
from pathlib import Path

import pytest
import torch

import kernels
from tests.kernels.emulated import build_library


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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """The CUDA library as the README has it built, but elsewhere: once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"cuda-{testrun_uid}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            done.write_text(str(build_library(folder / "build")))
    return Path(done.read_text())

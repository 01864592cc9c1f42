"""What all tests share: a core each, a cache of their own; tests of a GPU, of nvcc, of a browser only where there is one; those
that take hours only where they are asked for."""

import getpass
import importlib
import os
import shutil
import tempfile
from collections import Counter

import pytest
import torch
from hypothesis import settings

from engine.null_device import device
from kernels.choice import AVAILABLE
from tests import browsers, preloaded
from tests.golden import processor, stored

# Where no GPU is, Triton's kernels are interpreted, on CPU tensors. That is settled when a function is defined, Triton's
# own library included, so it comes before anything else that brings Triton in.
with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    for op, exist in AVAILABLE.items():
        if "triton" in exist:
            importlib.import_module(f"kernels.{op}.triton")

# The suite draws the same examples each time: it fails for what was changed. `explore` draws others at every run. A shared
# machine makes any example slow at times.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("suite")

# two workers share the cores
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data sets and screening results of a test session stay out of the user's cache; compiled code is shared by its workers."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    os.environ["TESSERA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_seed() -> None:
    """What a test draws doesn't hang on the tests before it, which differ from worker to worker."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    present = {
        "gpu": torch.cuda.is_available(),
        "nvcc": shutil.which("nvcc") is not None,
        "browser": browsers.installed() is not None,
        "null_device": device.can_be_built(),
        "faults": preloaded.can_be_built(),
        "golden": not stored.obstacle(),
        "other_processor": processor.can_be_stood_in_for(),
        "exhaustive": "exhaustive" in config.option.markexpr,
    }
    missing = [marker for marker, is_there in present.items() if not is_there]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in missing)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # files of long tests first: the short ones then fill what time is left of the two workers, to the end
    long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: -long[item.path])

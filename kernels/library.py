"""The CUDA C++ kernels of csrc/, built by CMake into one library that joins torch as `torch.ops.tessera_cuda`."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "libtessera_kernels.so"


def load(path: Path | None = None) -> None:
    """Load the library (None: `LIBRARY`); loading it again does nothing.

    Raises:
        ValueError: where it was not built, or does not fit to this torch.
    """
    path = path or LIBRARY
    if not path.is_file():
        raise ValueError(
            f"the CUDA kernels are not built: {path} is missing; where nvcc is, run "
            f"cmake -S {ROOT} -B {path.parent} && cmake --build {path.parent}"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ValueError(f"the CUDA kernels do not load ({error}); build them again with the torch in use") from error

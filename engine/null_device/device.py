"""The CUDA device that computes nothing: where it can be built, how, and a Python process that runs on it.

Needed are Linux, g++ and the headers in the wheels of torch for CUDA and of Triton; neither nvcc nor a GPU, nor its driver.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CHIPS = (80, 90)  # what nullcuda.cpp can be
ROOT = Path(__file__).parents[2]
SOURCES = tuple(Path(__file__).with_name(name) for name in ("nullcuda.cpp", "nullcublas.cpp", "nullnccl.cpp"))
SECONDS = 1500.0  # for a child, on a machine that others use


def headers() -> list[Path]:
    """The folders of CUDA's headers: the runtime's, cuBLAS's and NCCL's of the version torch was built for, and what those
    include of the compiler's, which come with Triton. Empty where one is missing."""
    major = (torch.version.cuda or "").partition(".")[0]
    found = []
    for package, folder, needed in (
        ("nvidia", f"cu{major}/include", "cublasLt.h"),
        ("nvidia", "nccl/include", "nccl.h"),
        ("triton", "backends/nvidia/include", "crt/host_defines.h"),
    ):
        spec = importlib.util.find_spec(package)
        places = [Path(place) / folder for place in (spec.submodule_search_locations if spec else ())]
        found += [place for place in places if (place / needed).is_file()][:1]
    return found if len(found) == 3 else []


def can_be_built() -> bool:
    return sys.platform == "linux" and shutil.which("g++") is not None and bool(headers())


def build(folder: Path) -> Path:
    """The folder in which the library lies as libcuda.so.1, a folder of `folder` named after its sources; built where it isn't.

    Raises:
        subprocess.CalledProcessError: g++ failed; what it said is on stderr.
    """
    parts = [torch.version.cuda or "", *(source.read_text() for source in SOURCES)]
    home = folder / hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
    if not home.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / "made"
            made.mkdir()
            subprocess.run(
                ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", *(f"-I{place}" for place in headers()),
                 "-Wl,-soname,libcuda.so.1", *map(str, SOURCES), "-o", str(made / "libcuda.so.1"), "-ldl"],
                check=True,
            )  # fmt: skip
            (made / "libcuda.so").symlink_to("libcuda.so.1")
            try:
                made.rename(home)
            except OSError:  # another process was faster
                if not home.is_dir():
                    raise
    return home


def environment(library: Path, chip: int, scratch: Path) -> dict[str, str]:
    """Variables of a process that sees the device; what it compiles and caches goes into `scratch`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TESSERA_KERNELS")}
    places = (str(library), os.environ.get("LD_LIBRARY_PATH", ""))
    return kept | {
        "LD_PRELOAD": str(library / "libcuda.so.1"), "LD_LIBRARY_PATH": ":".join(filter(None, places)),
        "TRITON_LIBCUDA_PATH": str(library), "NULLCUDA_SM": str(chip), "CUDA_VISIBLE_DEVICES": "0",
        "TRITON_CACHE_DIR": str(scratch / f"triton_{chip}"), "TESSERA_CACHE": str(scratch / "tessera"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / f"inductor_{chip}"), "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip


@contextmanager
def built() -> Iterator[Callable[..., dict[str, str]]]:
    """Given a chip, the environment of a process on a device that is built here and, with what is compiled, thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        yield lambda chip=90: environment(library, chip, Path(folder))


def process(
    arguments: Sequence[str], seen: Mapping[str, str], cwd: Path = ROOT, seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on the device; stdout and stderr are kept apart, the exit status is not looked at."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=dict(seen), cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
    )


def answer(module: str, arguments: Sequence[str], seen: Mapping[str, str]) -> Any:
    """What a module prints last on the device, as JSON.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = process(["-m", module, *arguments], seen)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])

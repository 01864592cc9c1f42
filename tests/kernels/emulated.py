"""What the tests of the CUDA C++ kernels share: the same source compiled for the host, and read back from a binary."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import torch
import triton.backends.nvidia as nvidia
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
A100, H100 = 164 * 1024, 228 * 1024  # bytes of shared memory of one multiprocessor
OPS = ("packed_attention", "sinkhorn")  # as csrc/host_main.cpp numbers them
COMPILE = "g++ -std=c++17 -O1 -g1 -fsanitize=address -Wall -Wextra -Werror -Wno-unknown-pragmas -DTESSERA_HOST".split()


def build_main(target: Path) -> Path:
    """Compile what reads a case, runs the kernels of an op and writes the answer."""
    subprocess.run([*COMPILE, "-c", CSRC / "host_main.cpp", "-o", target], check=True)
    return target


def build(text: str, main_object: Path, program: Path, *flags: str) -> Path:
    """Compile a kernel source for the host."""
    source = program.with_suffix(".cpp")
    source.write_text(text)
    subprocess.run([*COMPILE, *flags, f"-I{CSRC}", source, main_object, "-o", program], check=True)
    return program


def answer(program: Path, op: str, case: bytes) -> memoryview:
    """What the program says to one case of an op, in a process of its own; RuntimeError with what it says when it fails."""
    finished = subprocess.run([program], input=struct.pack("q", OPS.index(op)) + case, capture_output=True)
    if finished.returncode:
        raise RuntimeError(finished.stderr.decode())
    return memoryview(bytearray(finished.stdout))


def spanned(x: Tensor) -> int:
    """Number of elements from the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0


def memory_of(x: Tensor) -> bytes:
    return x.as_strided((spanned(x),), (1,)).view(torch.uint8).numpy().tobytes()


def build_library(folder: Path) -> Path:
    """The library as the README has it built, but elsewhere."""
    configure = ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "libtessera_kernels.so"


def inspect(library: Path, name: str, *arguments: str) -> dict[tuple[str, ...], str]:
    """What cuobjdump says of each kernel whose mangled name matches, by (chip, the groups of the match)."""
    tools = Path(nvidia.__file__).parent / "bin"  # cuobjdump calls nvdisasm beside it
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [tools / "cuobjdump", *arguments, library]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found = {}
    for chip in re.split(r"(?=arch = sm_)", text)[1:]:
        architecture = re.match(r"arch = (\w+)", chip)[1]
        for function in re.split(r"Function ?:? ?(?=_Z)", chip)[1:]:
            kernel = re.search(name, function)
            if kernel:
                found[architecture, *kernel.groups()] = function
    return found

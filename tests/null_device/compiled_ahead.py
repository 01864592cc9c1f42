"""Fill a Triton cache for a GPU that is not here, so that a machine with one, lent for minutes, spends none on compiling.

    python -m tests.null_device.compiled_ahead FOLDER [--chip 90] [-- FLAGS OF benchmarks.gpu]

runs `benchmarks.gpu` (its smoke part, where no flags are given) on the device that computes nothing: every launch goes its
whole way through Triton, and so has the key under which a GPU of that class looks for it. What the benchmark finds means nothing
and is thrown away. Then, over there, with the same torch and Triton: `TRITON_CACHE_DIR=FOLDER python -m benchmarks.gpu ...`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from engine.null_device import device


def fill(folder: Path, chip: int, flags: list[str], library: Path, scratch: Path) -> int:
    """Compile what the flags launch into the folder; how many kernels lie there now.

    Raises:
        RuntimeError: the benchmark did not end by itself, with the end of what it said.
    """
    seen = device.environment(library, chip, scratch) | {"TRITON_CACHE_DIR": str(folder.resolve())}
    done = device.process(["-m", "benchmarks.gpu", "--out", str(scratch / "record"), *flags], seen)
    if done.returncode not in (0, 1):  # 1: some check failed, as all do here
        raise RuntimeError(f"benchmarks.gpu ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return len(list(folder.rglob("*.cubin")))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.null_device.compiled_ahead", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chip", type=int, choices=device.CHIPS, default=90)
    parser.add_argument("flags", nargs="*", help="of benchmarks.gpu, behind --")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        found = fill(given.folder, given.chip, given.flags or ["--smoke"], device.build(scratch / "built"), scratch)
    print(f"{found} kernels for sm_{given.chip} in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

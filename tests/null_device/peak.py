"""Peak memory of a run's stages on a GPU, counted without one: each step whole, on an H200 that computes nothing.

    python -m tests.null_device.peak FLAGS

with the flags of `engine.train`, for example

    python -m tests.null_device.peak --method maect --model vit_large_patch16_224 --preset plain --batch-size 1024 --accumulate 4

In bf16, compiled, as runs on GPUs are; with `--no-compile` not. `--weights ANY` leaves the stage of MAE out, and nothing is read.
Bytes are those asked of the allocator: what it rounds up, and what CUDA itself takes (about half a GiB), comes on top.
"""

import os
import sys

from tests.null_device import device


def main(flags: list[str]) -> int:
    if "NULLCUDA_SM" in os.environ:
        return _count(flags)
    with device.built() as on_device:
        done = device.process(["-m", "tests.null_device.peak", *flags], on_device())
        print(done.stdout, end="")
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr, end="")
        return done.returncode


def _count(flags: list[str]) -> int:
    """On the device."""
    from engine.training import config
    from tests.null_device.steps import reports

    for stage, report in reports(flags, config.parse(flags).train.compile != "off"):
        faults = "; ".join(report.faults)
        peak, launches = (report.figures.get(name, 0) for name in ("peak_bytes", "launches"))
        print(
            f"{stage}: {peak / 2**30:.1f} GiB at its peak, {launches:,} launches{faults and f'; {faults}'}", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How one call is timed so that the device is measured and not the host, and what the device reaches at best."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.case import Machine
from kernels.calibration.clock import COLD, queued

BATCH = (
    16  # calls that are queued together; a call of 60 launches still fits into the driver's queue of about a thousand
)


def times(call: Callable[[], Any], on_gpu: bool, seconds: float = 0.15) -> dict[str, Any]:
    """Milliseconds of single calls: their median as "ms", "ms_best", "ms_worst", how many, and "host_ms".

    On a GPU they are queued as in calibration; what the host takes to queue a call is "host_ms".
    """
    call()
    if not on_gpu:
        found = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        return _summary(found, None)
    flush = torch.zeros(COLD["cuda"], dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    wanted = max(5, min(100, math.ceil(seconds / max(once, 1e-5))))
    found: list[float] = []
    while len(found) < wanted:
        ms, host = queued(call, min(BATCH, wanted), flush, host)
        found += ms
    return _summary(found, 1e3 * host)


def _summary(found: list[float], host_ms: float | None) -> dict[str, Any]:
    found = sorted(found)
    return {
        "ms": found[len(found) // 2], "ms_best": found[0], "ms_worst": found[-1], "runs": len(found), "host_ms": host_ms,
    }  # fmt: skip


def ceilings(at: Machine) -> dict[str, float]:
    """Bytes per second of a copy (read and written), and operations per second of a matrix product, on random data."""
    on_gpu = at.device == "cuda"
    source = at.randn(2**30 if on_gpu else 2**22)
    target = torch.empty_like(source)
    copy = times(lambda: target.copy_(source), on_gpu)["ms"]
    side = 8192 if on_gpu else 1024
    a, b = at.randn(side, side), at.randn(side, side)
    product = times(lambda: a @ b, on_gpu)["ms"]
    return {
        "bytes_per_second": 2e3 * source.numel() * source.element_size() / copy,
        "flops_per_second": 2e3 * side**3 / product,
    }

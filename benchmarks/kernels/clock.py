"""How one call is timed so that the device is measured and not the host, and what the device reaches at best."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.case import Machine

BATCH = (
    16  # calls that are queued together; a call of 60 launches still fits into the driver's queue of about a thousand
)
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


def times(call: Callable[[], Any], on_gpu: bool, seconds: float = 0.15) -> dict[str, Any]:
    """Milliseconds of single calls: their median as "ms", "ms_best", "ms_worst", how many, and "host_ms".

    On a GPU every call stands between two events of its own, with the L2 cache overwritten before it, so that it reads memory.
    The calls are queued behind a kernel that does nothing for as long as the host needs to queue them (its time is "host_ms" a
    call): when the device comes to them they all lie ready, and no gap of the host falls between two events.
    """
    call()
    if not on_gpu:
        found = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        return _summary(found, None)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    cycles_per_second = _cycles_per_second()
    wanted = max(5, min(100, math.ceil(seconds / max(once, 1e-5))))
    found = []
    while len(found) < wanted:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(min(BATCH, wanted))]
        torch.cuda._sleep(int(cycles_per_second * len(marks) * (1.5 * host + 5e-5)))
        start = time.perf_counter()
        for before, after in marks:
            flush.zero_()
            before.record()
            call()
            after.record()
        host = (time.perf_counter() - start) / len(marks)
        torch.cuda.synchronize()
        found += [before.elapsed_time(after) for before, after in marks]
    return _summary(found, 1e3 * host)


def _cycles_per_second() -> float:
    """Of the clock that torch.cuda._sleep counts."""
    cycles = 2_000_000
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    before.record()
    torch.cuda._sleep(cycles)
    after.record()
    torch.cuda.synchronize()
    return 1e3 * cycles / before.elapsed_time(after)


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

"""Times of several calls that do the same, taken so that they can be compared.

They take turns in rounds, so that a clock that falls or a neighbour that comes is every one's. Each call finds cold caches. On a
GPU calls are queued behind a kernel that waits, so that the host's time does not count, and each stands between two events.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

ROUNDS = 7
MOST = 32  # calls of a round: 60 launches each still fit into a driver's queue
COLD = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}  # bytes, more than the last cache


def compare(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, dict[str, float]]:
    """By name: "ms", the median over rounds of a round's median, and from "low" to "high" where all rounds but the two
    outermost lie; how many "runs". `seconds` for all of them."""
    flush = torch.zeros(COLD[device.type], dtype=torch.int8, device=device)
    once = {name: _warm(call, device) for name, call in calls.items()}
    share = seconds / (len(calls) * ROUNDS)
    repeats = {name: max(1, min(MOST, math.floor(share / (took + _flushing(device))))) for name, took in once.items()}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if device.type == "cuda":
                ms, _ = queued(call, repeats[name], flush, min(once[name], 0.02))
            else:
                ms = _timed(call, repeats[name], flush)
            rounds[name].append(_median(ms))
    return {
        name: {"ms": _median(ms), "low": sorted(ms)[1], "high": sorted(ms)[-2], "runs": ROUNDS * repeats[name]}
        for name, ms in rounds.items()
    }


def _warm(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call that is not the first."""
    for _ in range(2):
        call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return max(time.perf_counter() - start, 1e-6)


def _timed(call: Callable[[], Any], repeats: int, flush: torch.Tensor) -> list[float]:
    times = []
    for _ in range(repeats):
        flush.add_(1)
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def queued(call: Callable[[], Any], repeats: int, flush: torch.Tensor, host: float) -> tuple[list[float], float]:
    """Milliseconds of each of some calls on a GPU, and the seconds that the host took to queue one.

    Every call stands between two events of its own, with the L2 cache overwritten before it by `flush`, so that it reads memory.
    They are queued behind a kernel that does nothing for as long as that takes, by `host` seconds a call: when the device comes
    to them they all lie ready, and no gap of the host falls between two events.
    """
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(int(_cycles_per_second() * repeats * (1.5 * host + 5e-5)))
    start = time.perf_counter()
    for before, after in marks:
        flush.add_(1)
        before.record()
        call()
        after.record()
    host = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in marks], host


@cache
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


def _flushing(device: torch.device) -> float:
    """About how many seconds it takes to empty the caches."""
    return 2e-4 if device.type == "cuda" else 1e-2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]

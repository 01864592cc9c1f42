"""The whole training steps that `benchmarks.gpu` times, those worth most first, and what its guarded child does for each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import kernels
from benchmarks.kernels.case import OF_CPUS, OF_OTHERS
from benchmarks.kernels.jobs import fresh
from kernels.choice import AVAILABLE

METHODS = ("mae", "dino", "maect", "relvit")
GRAPHED = ("mae", "maect")  # of them, those whose published step is replayed from a CUDA graph


@dataclass(frozen=True)
class Planned:
    """A measurement of whole steps with one choice of kernels."""

    name: str
    implementation: str
    benchmark: str
    """throughput or multicrop."""
    options: dict[str, Any]
    """Of that benchmark's Options."""
    seconds: float
    """What must be left to begin it."""


def planned(device: str) -> Iterator[Planned]:
    """MAE, multi-crop DINO in its forms, two-view tuning and, on a GPU, RelViT: on the reference and on each of our
    implementations; compiled first, which is how one trains; and replayed from CUDA graphs what can be."""
    on_gpu = device == "cuda"
    model, batch = ("vit_large_patch16_224", 256) if on_gpu else ("vit_tiny_patch16_224", 2)
    exist = {one for each in AVAILABLE.values() for one in each}
    own = sorted(exist - {"reference", *OF_CPUS, *OF_OTHERS}) if on_gpu else []
    for compiles in (True, False):
        for method in METHODS if on_gpu else METHODS[:3]:
            for implementation in ("reference", *own):
                name = f"{method} {model}, {'compiled' if compiles else 'eager'}, kernels: {implementation}"
                common = {
                    "model": model, "compile": compiles, "device": device, "rounds": 3, "steps": 2 if on_gpu else 1,
                }  # fmt: skip
                if method != "dino":
                    peer = method == "mae" and implementation == "reference"
                    options = {"method": method, "batch_size": batch, "peer": peer, **common}
                    yield Planned(name, implementation, "throughput", options, 90 if on_gpu else 20)
                    if on_gpu and compiles and method in GRAPHED and implementation == "reference":
                        replayed = options | {"peer": False, "graphs": True}
                        yield Planned(f"{name}, replayed from a graph", implementation, "throughput", replayed, 90)
                elif compiles == on_gpu:
                    # lightly's form takes minutes to compile: `benchmarks.multicrop` has it
                    forms = ["packed", "per-size", *(("padded",) if implementation == "reference" else ())]
                    sizes = {"batch_size": 32} if on_gpu else {"batch_size": 2, "prototypes": 1024, "memory": False}
                    options = {"forms": forms, **sizes, **common}
                    yield Planned(name, implementation, "multicrop", options, 150 if on_gpu else 40)


def measure(implementation: str, benchmark: str, options: dict[str, Any]) -> dict[str, Any]:
    """The record of the benchmark, with every op on `implementation` where it has it and else on the reference."""
    # here, so that what times kernels needs neither the loader nor the command line
    from benchmarks import multicrop, throughput

    fresh()
    for op, exist in AVAILABLE.items():
        kernels.use(implementation if implementation in exist else "reference", op)
    module = {"throughput": throughput, "multicrop": multicrop}[benchmark]
    asked = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    try:
        return module.measure(module.Options(**asked))
    finally:
        kernels.use("auto")


def profile(device: str) -> list[dict[str, Any]]:
    """Where the time of an MAE step goes: the twenty most expensive operations on the device."""
    from benchmarks import throughput

    fresh()
    on_gpu = device == "cuda"
    model, batch = ("vit_large_patch16_224", 256) if on_gpu else ("vit_tiny_patch16_224", 2)
    options = throughput.Options(method="mae", model=model, batch_size=batch, device=device, compile=on_gpu)
    step, _ = throughput.ours(options, torch.device(device), "bf16" if on_gpu else "fp32")
    for _ in range(3):
        step()
    with torch.profiler.profile() as seen:
        for _ in range(3):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, attribute))
    total = sum(getattr(row, attribute) for row in rows) or 1.0
    return [
        {"operation": row.key[:120], "share": getattr(row, attribute) / total, "calls": row.count} for row in rows[:20]
    ]

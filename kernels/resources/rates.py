"""What each pipe of a chip takes per clock: the only numbers of the pipe model that are not counted.

None of them is calibrated on a card yet: they stand in NVIDIA's documents and in published measurements. `calibrated`
puts what a run on a card has measured in their place.

Sources, by field:
    sms, clock: data sheets of A100 SXM 80 GB, H100 SXM and H200 SXM; the clock is the one at which their published
        matrix peak is reached (312, 989, 989 TFLOP/s in bf16).
    issue: four schedulers, one instruction a clock each (CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0).
    fp32, multiply, integer, special, shuffle: the Guide's table of arithmetic throughput, in warps of 32 lanes.
    tensor: 1,024 multiply-adds on A100 (its white paper). H100 reaches its 2,048 only by wgmma; by mma.sync about 62 %
        of them (Luo et al. 2024, "Benchmarking and dissecting the NVIDIA Hopper GPU architecture").
    shared: 32 banks of 4 bytes, one access each a clock (the Guide); the first-level cache uses the same wires.
    dram: the share of the data sheet's bandwidth (2.04, 3.35, 4.8 TB/s) that plain copies are known to reach: 86 % on
        A100, and 90 % assumed on the others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

NOT_CALIBRATED = "not calibrated on a card yet"


@dataclass(frozen=True)
class Rates:
    """One chip. Rates are per multiprocessor and clock.

    `issue`, `fp32` (additions and multiply-adds), `multiply` (of integers, in the same pipe), `integer` (all other logic,
    comparisons and conversions to 16 bit) and `special` (exponentials, reciprocals, other conversions) are in
    instructions of a warp; `mma` and `wgmma` in multiply-adds of 16-bit operands by the two kinds of matrix
    instructions (0: has none); `shared` in bytes. `clock` in Hz, `dram` in bytes per second.
    """

    name: str
    capability: int
    sms: int
    clock: float
    dram: float
    issue: float
    mma: float
    wgmma: float
    special: float
    fp32: float
    multiply: float
    integer: float
    shared: float
    origin: str = NOT_CALIBRATED

    @property
    def flops(self) -> float:
        """Peak of the matrix pipe, in operations per second."""
        return 2 * max(self.mma, self.wgmma) * self.sms * self.clock


_AMPERE = {"capability": 80, "issue": 4, "mma": 1024, "wgmma": 0, "special": 0.5, "fp32": 2, "multiply": 2}
_HOPPER = {"capability": 90, "issue": 4, "mma": 0.62 * 2048, "wgmma": 2048, "special": 0.5, "fp32": 4, "multiply": 2}
CHIPS = {
    rates.name: rates
    for rates in (
        Rates("A100", sms=108, clock=1.41e9, dram=1.75e12, integer=2, shared=128, **_AMPERE),
        Rates("H100", sms=132, clock=1.83e9, dram=3.0e12, integer=2, shared=128, **_HOPPER),
        Rates("H200", sms=132, clock=1.83e9, dram=4.3e12, integer=2, shared=128, **_HOPPER),
    )
}
_MEASURABLE = {field.name for field in fields(Rates)} - {"name", "capability", "origin"}


def calibrated(record: Mapping[str, Any]) -> Rates:
    """Rates of a chip with what a run on a card has measured.

    Args:
        record: {"chip": "H200", "origin": which card, run and day, "rates": {"dram": 4.2e12, ...}}, the rates under the
            names and in the units of `Rates`; what it lacks stays as published.

    Raises:
        ValueError: for an unknown chip or rate, a rate that is not a positive number, or a missing origin.
    """
    chip, origin, measured = (record.get(key) for key in ("chip", "origin", "rates"))
    if chip not in CHIPS:
        raise ValueError(f"a calibration needs a chip of {', '.join(CHIPS)}, got {chip!r}")
    if not isinstance(origin, str) or not origin:
        raise ValueError("a calibration needs its origin: which card, run and day")
    if not isinstance(measured, Mapping) or not measured.keys() <= _MEASURABLE:
        raise ValueError(f"a calibration needs rates by name, of {', '.join(sorted(_MEASURABLE))}, got {measured!r}")
    for name, value in measured.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"a calibration needs a positive number for {name}, got {value!r}")
    return replace(CHIPS[chip], origin=origin, **measured)


def read(path: Path | None) -> dict[str, Rates]:
    """All chips by name, one of them as the calibration in this JSON file says (None: all as published)."""
    if path is None:
        return dict(CHIPS)
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no calibration: {error}") from None
    if not isinstance(record, Mapping):
        raise ValueError(f"{path} holds no calibration: not a JSON object")
    rates = calibrated(record)
    return CHIPS | {rates.name: rates}

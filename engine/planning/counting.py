"""One step of a stage of a run, counted on the device that computes nothing: what it launches, moves, computes and holds.

`count` asks a process that sees the device and runs this file, with torch's own CUDA code and the engine's own update, in the
precision and with the options of the run; what it found is kept in the user's cache, under all that it depends on.

Ops run by their reference unless --kernels names others: a card that is calibrated may take better ones. Images are memory that
nobody wrote. Of several processes one is counted: what they send each other is not, nor are rows of the
others that a loss compares with.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import torch

import kernels
from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.core.phases import Phase
from engine.data import cache
from engine.data.sources import usable_cpus
from engine.null_device import device, forking
from engine.null_device.record import recorded
from engine.planning import peak
from engine.planning.traffic import KINDS, Account, Moved, accounting
from engine.training import config
from engine.training.config import Plan
from engine.training.portions import Portion
from engine.training.step import Update
from engine.training.stepping import fingerprint, method_of, stepping

WARM = 2  # steps until everything is compiled and allocated
MEMORY = 2**42  # bytes: also what no card holds is counted
_TURNS: dict[Path, threading.Lock] = {}


@dataclass(frozen=True)
class Count:
    """Of one step of one process.

    Attributes:
        launches: of the GPU's kernels, products, fills and copies.
        rows: what they move and compute.
        peak: bytes at the step's peak, by `engine.planning.peak.PARTS`.
        gradient_bytes: that each process sends to the others.
        flops_per_image: that the method credits a step with.
    """

    launches: int
    rows: tuple[Moved, ...]
    peak: dict[str, int]
    gradient_bytes: int
    flops_per_image: float

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [row.as_json() for row in self.rows]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Count":
        return cls(**saved | {"rows": tuple(map(Moved.from_json, saved["rows"]))})


def counted(step: Callable[[int], None], update: Update) -> Count:
    """On the device: the step once it is warm."""
    account = Account()
    with accounting(account):
        for number in range(WARM):
            step(number)
        with peak.recorded(update) as held:
            step(WARM)
        with recorded() as events, account:
            step(WARM + 1)
    launches = sum(event.kind in KINDS for event in events)
    rows = sorted(account.found.values(), key=lambda row: -row.bytes)
    gradients = 4 * sum(p.numel() for p in update.trained)
    return Count(launches, tuple(rows), held.bytes, gradients, update.method.flops_per_image())


def count(plan: Plan, flags: Sequence[str], portion: Portion, gpus: int, precision: str, chip: int) -> Count:
    """A step of a portion of a plan, parsed of these flags, on one of so many GPUs: from the cache, or counted in half a minute.

    Raises:
        BadInput: the device that computes nothing cannot be built here, or the step cannot be taken.
    """
    folder = cache.folder() / "planned"
    shown = asdict(portion.phase), portion.images_per_step
    kept = folder / f"{fingerprint(plan, portion.stage.index, *shown, gpus, precision, chip)}.json"
    asked = {
        "flags": list(flags),
        "stage": portion.stage.index,
        "phase": asdict(portion.phase),
        "batch": portion.images_per_step,
        "gpus": gpus,
        "precision": precision,
    }
    variables = {"NULLCUDA_SM": str(chip), "TRITON_CACHE_DIR": str(folder / f"triton_{chip}")}
    with _turn(kept):
        if not kept.exists():
            with _turn(folder):
                workers = _workers(folder)
            try:
                found = json.dumps(workers.answer(asked, variables))
            except RuntimeError as error:
                raise BadInput(f"a step of stage {portion.name} cannot be counted: {error}") from error
            write_file(kept, lambda aside: aside.write_text(found))
        return Count.from_json(json.loads(kept.read_text()))


def _turn(path: Path) -> threading.Lock:
    """Of the threads that want the same: the first makes it."""
    return _TURNS.setdefault(path, threading.Lock())


@once
def _workers(folder: Path) -> forking.Workers:
    """As many as there are cores, each counting one step at a time."""
    seen = device.environment(_library(folder / "device"), device.CHIPS[0], folder) | {"NULLCUDA_MEMORY": str(MEMORY)}
    return forking.Workers("engine.planning.counting", seen, usable_cpus())


def _library(folder: Path) -> Path:
    if not device.can_be_built():
        raise BadInput(
            "a step can only be counted on Linux, with g++ and the torch wheel for CUDA; g++ may be missing here."
        )
    try:
        return device.build(folder)
    except subprocess.CalledProcessError as error:
        raise BadInput(
            f"the device that steps are counted on could not be built: g++ ended with {error.returncode}."
        ) from error


def answered(asked: dict[str, Any]) -> dict[str, Any]:
    """On the device: a count, as JSON."""
    plan = config.parse(asked["flags"])
    torch.set_float32_matmul_precision("high")  # as training does
    kernels.use("reference" if plan.train.kernels == "auto" else plan.train.kernels)
    torch.manual_seed(0)
    stage, train = asked["stage"], plan.train
    method = method_of(plan, stage)
    (method.phase,) = Phase.read(asked["phase"]).forms
    step, update = stepping(
        method, train.compile != "off", stage, train.accumulate,
        gpus=asked["gpus"], precision=asked["precision"], logged=False, images_per_step=asked["batch"],
    )  # fmt: skip
    return counted(step, update).as_json()


if __name__ == "__main__":
    sys.exit(forking.serve(answered))

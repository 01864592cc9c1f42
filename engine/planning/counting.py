"""One step of a stage of a run, counted on the device that computes nothing: what it launches, moves, computes and holds.

`count` asks a process that sees the device and runs this file, with torch's own CUDA code and the engine's own update, in the
precision and with the options of the run; what it found is kept in the user's cache, under all that it depends on.

Ops run by their reference unless --kernels names others: a card that is calibrated may take better ones. Images are memory that
nobody wrote. Of several processes one is counted as if it were alone: what they send each other is not, nor are draws for the
others' rows, and these rows where a loss compares with them. All cards are counted as Hopper: the others launch the same, and
their cuBLAS takes 48 MiB less.

Micro-batches after the second each add the same to a step, so two and three of them are counted, and any number from these; but
not where images of the whole batch are compared.
"""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from engine.training import config, gradient_cache
from engine.training.config import Plan
from engine.training.portions import Portion
from engine.training.step import Update
from engine.training.stepping import fingerprint, made_ready, method_of, stepping

WARM = 2  # steps until everything is compiled and allocated
MEMORY = 2**42  # bytes: also what no card holds is counted
CHIP = 90  # compute capability
FEW = (2, 3)  # micro-batches that say what any number of them takes
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

    def further(self, of_one_more: "Count", by: int) -> "Count":
        """A step of `by` more micro-batches than this one's, each of which adds what one more adds to this.

        Of work over the whole batch, which is other work in each, calls may be fewer than none; sums are right.
        """

        def on(one: int, other: int) -> int:
            return one + by * (other - one)

        mine, others = ({(row.part, row.name): row for row in count.rows} for count in (self, of_one_more))
        rows = []
        for part, name in sorted(mine.keys() | others.keys()):
            one, other = (of.get((part, name), Moved(part, name)) for of in (mine, others))
            work = Counter({each: on(one.work[each], other.work[each]) for each in one.work | other.work})
            rows.append(Moved(part, name, on(one.launches, other.launches), work))
        return replace(
            self,
            launches=on(self.launches, of_one_more.launches),
            rows=tuple(sorted(rows, key=lambda row: -row.bytes)),
            peak={part: on(held, of_one_more.peak[part]) for part, held in self.peak.items()},
        )

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


def count(plan: Plan, flags: Sequence[str], portion: Portion, gpus: int, precision: str) -> Count:
    """A step of a portion of a plan, parsed of these flags, on one of so many GPUs: from the cache, or counted in half a minute.

    Raises:
        BadInput: the device that computes nothing cannot be built here, or the step cannot be taken.
    """
    folder, stage = cache.folder() / "planned", portion.stage.index
    wanted = plan.train.accumulate
    alike = wanted > 1 and not gradient_cache.needed(plan.stages[stage][1], wanted)
    asked = {
        "stage": stage,
        "phase": asdict(portion.phase),
        "images": portion.images_per_step // (gpus * wanted),
        "micro_batches": FEW if alike else (wanted,),
        "precision": precision,
    }
    as_asked = replace(plan, train=replace(plan.train, accumulate=1))
    kept = folder / f"{fingerprint(as_asked, stage, asked)}.json"
    variables = {"NULLCUDA_SM": str(CHIP), "TRITON_CACHE_DIR": str(folder / "triton")}
    with _turn(kept):
        if not kept.exists():
            with _turn(folder):
                workers = _workers(folder)
            try:
                found = json.dumps(workers.answer(asked | {"flags": list(flags)}, variables))
            except RuntimeError as error:
                raise BadInput(f"a step of stage {portion.name} cannot be counted: {error}") from error
            write_file(kept, lambda aside: aside.write_text(found))
        first, *more = map(Count.from_json, json.loads(kept.read_text()))
    return first.further(more[0], wanted - FEW[0]) if alike else first


def _turn(path: Path) -> threading.Lock:
    """Of the threads that want the same: the first makes it."""
    return _TURNS.setdefault(path, threading.Lock())


@once
def _workers(folder: Path) -> forking.Workers:
    """As many as there are cores, each counting one step at a time."""
    seen = device.environment(_library(folder / "device"), CHIP, folder) | {"NULLCUDA_MEMORY": str(MEMORY)}
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


def answered(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """On the device: counts, as JSON, of a step of so many micro-batches each."""
    plan = config.parse(asked["flags"])
    torch.set_float32_matmul_precision("high")  # as training does
    kernels.use("reference" if plan.train.kernels == "auto" else plan.train.kernels)
    torch.manual_seed(0)
    stage = asked["stage"]
    method = method_of(plan, stage)
    (method.phase,) = Phase.read(asked["phase"]).forms
    made_ready(method, plan.train.compile != "off")

    def of(micro_batches: int) -> Count:
        images = micro_batches * asked["images"]
        return counted(
            *stepping(method, stage, micro_batches, precision=asked["precision"], logged=False, images=images)
        )

    return [of(micro_batches).as_json() for micro_batches in asked["micro_batches"]]


if __name__ == "__main__":
    import engine.model.twins  # noqa: F401 (takes seconds: here once, and not in every child)

    sys.exit(forking.serve(answered))

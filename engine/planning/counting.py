"""One step of a stage of a run, counted on the device that computes nothing: what it launches, moves, computes and holds.

`count` asks a process that sees the device and runs this file, with torch's own CUDA code and the engine's own update, in the
precision and with the options of the run; what it found is kept in the user's cache, under all that it depends on.

Ops run by their reference unless --kernels names others: a card that is calibrated may take better ones. Images are memory that
nobody wrote. Of several processes one is counted: what they send each other is not, nor are rows of the
others that a loss compares with.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import torch

import kernels
from engine.core.draws import Draws
from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.core.phases import Phase
from engine.data import cache
from engine.data.sources import usable_cpus
from engine.methods.base import Method
from engine.model import recomputing, residual, vit
from engine.null_device import device, forking
from engine.null_device.record import recorded
from engine.planning import peak
from engine.planning.traffic import KINDS, Account, Moved, accounting
from engine.training import config
from engine.training.build import compile_regions
from engine.training.calls import without_data
from engine.training.config import Plan
from engine.training.drawing import drawn
from engine.training.portions import Portion
from engine.training.step import Update

WARM = 2  # steps until everything is compiled and allocated
CLASSES = 1000  # of ImageNet
MEMORY = 2**42  # bytes: also what no card holds is counted
# settings of a stage that a step costs the same with
FREE = (
    "epochs", "base_lr", "start_lr", "end_lr", "weight_decay", "weight_decay_end", "betas", "warmup", "schedule", "drops",
    "horizon", "crop_scale", "flip", "labels_per_class", "phases", "phase_sides", "phase_keeps", "phase_locals", "phase_patches",
    "patch_draws", "side_draws", "phase_depths", "phase_clock", "phase_batch", "phase_choice",
)  # fmt: skip


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


def method_of(plan: Plan, stage: int) -> Method:
    """What a stage trains, after the stages before it, with the options of the plan; on the CPU, and no image was seen."""
    encoder = vit.create(plan.model, **plan.encoder)
    method = None
    for name, settings in plan.stages[: stage + 1]:
        earlier, method = method, without_data(name, settings, encoder, CLASSES)
        if earlier is not None:
            method.inherit(earlier)
    recomputing.choose(method, plan.train.recompute)
    residual.choose(method, plan.train.residual)
    return method


def stepping(
    method: Method,
    compiles: bool,
    stage: int = 0,
    accumulate: int = 1,
    *,
    gpus: int = 1,
    precision: str = "bf16",
    graphs: bool = False,
    logged: bool = True,
    images_per_step: int = 0,
) -> tuple[Callable[[int], None], Update]:
    """On the device: the engine's update of a method as the loop calls it with a step's draws, in one of so many processes; of as
    many images as its settings have, or as are given."""
    place, batch = torch.device("cuda", 0), images_per_step or method.settings.batch_size
    rows = batch // gpus
    method.to(place).train()
    if compiles:
        compile_regions(method)
    update = Update(method, 1000, precision, accumulate, graphs=graphs)
    images = tuple(torch.empty(rows, 3, *view.size, device=place) for view in method.views())
    ids = torch.arange(rows, device=place)

    def step(number: int) -> None:
        draws = Draws(0, stage, number, batch=batch, rows=slice(0, rows), device=place)
        update(number, images, ids, drawn(method, draws), logged)

    return step, update


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
    kept = folder / f"{_key(plan, portion, gpus, precision, chip)}.json"
    if kept.exists():
        return Count.from_json(json.loads(kept.read_text()))
    asked = {
        "flags": list(flags),
        "stage": portion.stage.index,
        "phase": asdict(portion.phase),
        "batch": portion.images_per_step,
        "gpus": gpus,
        "precision": precision,
    }
    variables = {"NULLCUDA_SM": str(chip), "TRITON_CACHE_DIR": str(folder / f"triton_{chip}")}
    try:
        found = Count.from_json(_workers(folder).answer(asked, variables))
    except RuntimeError as error:
        raise BadInput(f"a step of stage {portion.name} cannot be counted: {error}") from error
    write_file(kept, lambda aside: aside.write_text(json.dumps(found.as_json())))
    return found


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


def _key(plan: Plan, portion: Portion, gpus: int, precision: str, chip: int) -> str:
    """All that a count depends on: what is trained, how, and the code that does it."""
    stages = [
        (name, {key: value for key, value in asdict(settings).items() if key not in FREE})
        for name, settings in plan.stages[: portion.stage.index + 1]
    ]
    how = {name: getattr(plan.train, name) for name in ("accumulate", "recompute", "residual", "compile", "kernels")}
    phase = asdict(portion.phase) | {"batch": portion.images_per_step}
    request = json.dumps([plan.model, plan.encoder, stages, phase, how, gpus, precision, chip, _code()], sort_keys=True)
    return hashlib.blake2b(request.encode(), digest_size=16).hexdigest()


@once
def _code() -> str:
    """Of torch and of every file of the engine's and the kernels' that a step may run."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=16)
    for folder in ("engine", "kernels"):
        for path in sorted((device.ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


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

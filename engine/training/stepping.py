"""Steps of a run's stages where its data are not: to be counted, and to be tried before the first."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.draws import Draws
from engine.methods.base import Method
from engine.model import recomputing, residual, vit
from engine.training.build import compile_regions
from engine.training.calls import without_data
from engine.training.config import Plan
from engine.training.drawing import drawn
from engine.training.operations import CLASSES
from engine.training.step import Update

TOTAL = 1000  # steps of the stage, by its schedules
ROOT = Path(__file__).parents[2]
# settings of a stage that a step costs the same with
FREE = (
    "epochs", "base_lr", "start_lr", "end_lr", "weight_decay", "weight_decay_end", "betas", "warmup", "schedule", "drops",
    "horizon", "crop_scale", "flip", "labels_per_class", "phases", "phase_sides", "phase_keeps", "phase_locals", "phase_patches",
    "patch_draws", "side_draws", "phase_depths", "phase_clock", "phase_batch", "phase_choice",
)  # fmt: skip


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


def made_ready(method: Method, compiles: bool, device: torch.device | str = "cuda:0") -> Method:
    """On its device, training, and compiled where that is asked for; the same one."""
    method.to(device).train()
    if compiles:
        compile_regions(method)
    return method


def stepping(
    method: Method,
    stage: int = 0,
    accumulate: int = 1,
    *,
    precision: str = "bf16",
    graphs: bool = False,
    logged: bool = True,
    images: int = 0,
    noise: bool = False,
) -> tuple[Callable[[int], None], Update]:
    """The engine's update of a method that was made ready, as the loop calls it with a step's draws, in one process.

    Args:
        images: of a step, where they are not as many as the settings say.
        noise: images are random numbers of each step's own; else one memory that nobody wrote.
    """
    place, rows = next(method.parameters()).device, images or method.settings.batch_size
    update = Update(method, TOTAL, precision, accumulate, graphs=graphs)
    sizes = [(rows, 3, *view.size) for view in method.views()]
    unwritten = tuple(torch.empty(size, device=place) for size in sizes if not noise)
    ids = torch.arange(rows, device=place)

    def shown(number: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(place).manual_seed(number)
        return tuple(torch.randn(size, device=place, generator=generator) for size in sizes)

    def step(number: int) -> None:
        draws = Draws(0, stage, number, batch=rows, rows=slice(0, rows), device=place)
        update(number, shown(number) if noise else unwritten, ids, drawn(method, draws), logged)

    return step, update


def fingerprint(plan: Plan, stage: int, *others: Any) -> str:
    """Of all that a step of a stage depends on: what is trained, how, the code that does it, and others, as JSON."""
    stages = [
        (name, {key: value for key, value in asdict(settings).items() if key not in FREE})
        for name, settings in plan.stages[: stage + 1]
    ]
    how = {name: getattr(plan.train, name) for name in ("accumulate", "recompute", "residual", "compile", "kernels")}
    request = json.dumps([plan.model, plan.encoder, stages, how, others, _code()], sort_keys=True)
    return hashlib.blake2b(request.encode(), digest_size=16).hexdigest()


@cache
def _code() -> str:
    """Of torch and of every file of the engine's and the kernels' that a step may run."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=16)
    for folder in ("engine", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()

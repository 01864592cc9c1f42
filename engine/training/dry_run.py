"""`--dry-run`: build every stage, make a few measured steps, say how fast, how large and how long. Nothing is written."""

import resource
import time
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from engine.core import dist
from engine.core.host_memory import to_device
from engine.training.build import build
from engine.training.choosing import choose
from engine.training.config import Plan
from engine.training.drawing import drawing
from engine.training.parts import Parts
from engine.training.state import TrainState

WARM_UP, MEASURED = 3, 8


def dry_run(parts: Parts) -> int:
    """Print images/s, peak memory and hours of every stage, measured on real batches of the data. Returns the exit status."""
    choose(parts, None, lambda line: print(line) if parts.ranks.first else None)
    table = Table(title=f"dry run: {parts.plan.train.method}, {parts.plan.model}, {parts.precision}")
    for heading in ("stage", "first step (s)", "images/s", "steps", "hours", "peak memory (GiB)"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    state, hours, measured = None, 0.0, replace(parts, plan=_without_reuse(parts.plan))
    for stage in parts.stages:
        state = build(measured, stage.index, state.method if state else None)
        first, rate = _measure(measured, state)
        reuse = getattr(parts.settings(stage.index), "reuse", 0)
        # a stage that stores features encodes as many images as it stores; its steps on them are nothing beside that
        images = reuse * len(parts.images(stage.index)) if reuse else stage.total_steps * stage.images_per_step
        stage_hours = images / rate / 3600
        hours += stage_hours
        cells = (
            f"{first:.1f}",
            f"{rate:,.0f}",
            f"{stage.total_steps:,}",
            f"{stage_hours:,.2f}",
            f"{_peak_memory(parts):.1f}",
        )
        table.add_row(stage.name, *cells)
    if parts.ranks.first:
        Console().print(table)
        print(f"the whole run: about {hours:,.2f} hours with {parts.ranks.world} process(es), evaluation not counted.")
    return 0


def _without_reuse(plan: Plan) -> Plan:
    """A stage that trains on stored features encodes at every step instead, so that this can be timed."""
    stages = [(name, replace(s, reuse=0) if hasattr(s, "reuse") else s) for name, s in plan.stages]
    return replace(plan, stages=tuple(stages))


def _measure(parts: Parts, state: TrainState) -> tuple[float, float]:
    """Seconds of the first step (compilation included), and images per second of the run after the warm-up."""
    ranks, stage = parts.ranks, parts.stages[state.stage]
    loader = parts.loader(state)
    marks = [time.perf_counter()]
    try:
        with drawing(state.method, partial(parts.draws, stage.index), 0, WARM_UP + MEASURED) as drawn:
            for step in range(WARM_UP + MEASURED):
                batch = next(loader)
                # most steps are not logged
                state.update(step, batch.images, to_device(batch.ids, ranks.device), drawn(step), logged=False)
                if step in (0, WARM_UP - 1, WARM_UP + MEASURED - 1):
                    if ranks.device.type == "cuda":
                        torch.cuda.synchronize()
                    dist.barrier()
                    marks.append(time.perf_counter())
    finally:
        loader.close()
    start, first, warm, end = marks
    return first - start, MEASURED * stage.images_per_step / (end - warm)


def _peak_memory(parts: Parts) -> float:
    """GiB: of the GPU where there is one, else of this process."""
    if parts.ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

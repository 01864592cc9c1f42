"""`--dry-run`: build every stage, make a few measured steps, say how fast, how large and how long. Nothing is written.

Where the steps wait for images, the loader is timed alone as well, with other numbers of threads.
"""

import resource
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic

import torch
from rich.console import Console
from rich.table import Table

from engine.core import dist
from engine.core.errors import BadInput
from engine.core.gpus import of_full_memory
from engine.core.host_memory import to_device
from engine.data.batch import Batch
from engine.data.stream import QUEUE
from engine.training.build import build
from engine.training.choosing import choose
from engine.training.config import Plan
from engine.training.drawing import drawing
from engine.training.operations import cheapest
from engine.training.parts import Parts
from engine.training.portions import portions
from engine.training.state import TrainState
from engine.training.waits import Feed, Waits, verdict

WARM_UP, MEASURED = 3, 8
SECONDS_ALONE = 3.0  # for which a loader is timed


@dataclass(frozen=True)
class _Measured:
    """Of a portion's steps.

    Attributes:
        first: seconds of the first step, compilation included.
        images_per_second: after the warm-up, over all ranks.
        waiting: share of that time in which they waited for images.
    """

    first: float
    images_per_second: float
    waiting: float


@dataclass(frozen=True)
class Planned:
    """Of a portion, what `engine.plan` says beforehand: images per second of all ranks, and GiB at a step's peak."""

    images_per_second: float
    peak: float


def dry_run(parts: Parts, planned: Sequence[Planned] = ()) -> int:
    """Print images/s, peak memory and hours of every stage and phase, measured on real batches of the data, beside what was
    planned of each where that is given. Returns the exit status. Raises BadInput where a step does not fit into memory."""
    try:
        return _dry_run(parts, planned)
    except torch.OutOfMemoryError as error:
        raise BadInput(f"{of_full_memory(error)}.") from error


def _dry_run(parts: Parts, planned: Sequence[Planned]) -> int:
    choose(parts, None, lambda line: print(line) if parts.ranks.first else None)
    table = Table(title=f"dry run: {parts.plan.train.method}, {parts.plan.model}, {parts.precision}")
    headings = ["stage", "first step (s)", "images/s", "waiting for data", "steps", "hours", "peak memory (GiB)"]
    for heading in headings + ["images/s planned", "GiB planned"] * bool(planned):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    state, measured, said = None, replace(parts, plan=_without_reuse(parts.plan)), []
    # by stage; and as if all its steps were like those of its last portion
    hours, like_last = defaultdict(float), {}
    least = cheapest(parts.plan, parts.stages)
    for number, portion in enumerate(portions(parts.plan, parts.stages, least)):
        if parts.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if state is None or state.stage != portion.stage.index:
            state = build(measured, portion.stage.index, state.method if state else None)
        state.update.begin_phase(portion.phase, portion.images_per_step)
        found = _measure(measured, state)
        step_hours = portion.images_per_step / found.images_per_second / 3600
        portion_hours = portion.steps * step_hours
        hours[portion.stage.name] += portion_hours
        like_last[portion.stage.name] = portion.stage.total_steps * step_hours
        peak = _peak_memory(parts)
        cells = [
            f"{found.first:.1f}",
            f"{found.images_per_second:,.0f}",
            f"{found.waiting:.0%}",
            f"{portion.steps:,}",
            f"{portion_hours:,.2f}",
            f"{peak:.2f}",
        ]
        for plan in planned[number : number + 1]:
            cells += [_beside(plan.images_per_second, found.images_per_second, ",.0f"), _beside(plan.peak, peak, ".2f")]
        table.add_row(portion.name, *cells)
        said += _about_loader(measured, state, found)
    if parts.ranks.first:
        Console().print(table)
        print(*said, sep="\n", end="\n" if said else "")
        most = sum(like_last[name] if name in least else taken for name, taken in hours.items())
        more = f" (where auto takes the cheapest each time; {most:,.2f} where it takes all tokens)" * bool(least)
        whole = f"about {sum(hours.values()):,.2f} hours{more} with {parts.ranks.world} process(es)"
        print(f"the whole run: {whole}, evaluation not counted.")
    return 0


def _beside(planned: float, measured: float, form: str) -> str:
    """The planned figure, and by how much the measured one is above it."""
    return f"{planned:{form}} ({measured / planned - 1:+.0%})"


def _without_reuse(plan: Plan) -> Plan:
    """A stage that trains on stored features encodes at every step instead, so that this can be timed."""
    stages = [(name, replace(s, reuse=0) if hasattr(s, "reuse") else s) for name, s in plan.stages]
    return replace(plan, stages=tuple(stages))


def _measure(parts: Parts, state: TrainState) -> _Measured:
    ranks, images = parts.ranks, state.update.images_per_step
    loader, waits, waited = parts.loader(state), Waits(ranks.device), 0.0
    marks = [monotonic()]
    try:
        with drawing(state.method, partial(parts.draws, state.stage, batch=images), 0, WARM_UP + MEASURED) as drawn:
            for step in range(WARM_UP + MEASURED):
                batch = waits.fetch(loader)
                # most steps are not logged
                chosen = drawn(step) | batch.shapes
                state.update(step, batch.images, to_device(batch.ids, ranks.device), chosen, logged=False)
                if step in (0, WARM_UP - 1, WARM_UP + MEASURED - 1):
                    _wait(ranks.device)
                    dist.barrier()
                    marks.append(monotonic())
                    waited = waits.seconds()
    finally:
        loader.close()
    start, first, warm, end = marks
    waiting = min(1.0, dist.largest(waited / (end - warm), ranks.device))
    return _Measured(first - start, MEASURED * images / (end - warm), waiting)


def _about_loader(parts: Parts, state: TrainState, found: _Measured) -> list[str]:
    """Where the stage waits for images: that it does, what to try, and how fast the loader alone is."""
    feed, stage = parts.feed(state), parts.stages[state.stage]
    told = verdict(found.waiting, feed)
    if not told:
        return []
    rates = []
    for threads in other_threads(feed):
        loader = parts.with_threads(threads).loader(state)
        try:
            dist.barrier()
            own = rate_alone(
                loader, state.update.images_per_step // parts.ranks.world, partial(_wait, parts.ranks.device)
            )
        finally:
            loader.close()
        whole = float(dist.all_reduce(torch.tensor(own, dtype=torch.float64, device=parts.ranks.device)))
        rates.append(f"{whole:,.0f} with {threads} thread{'s' if threads > 1 else ''}")
    steps = found.images_per_second / (1 - found.waiting) if found.waiting < 1 else float("inf")
    return [
        f"{stage.name}: {told}.",
        f"{stage.name}: without waiting the steps could take {steps:,.0f} images/s; the loader alone makes "
        f"{', '.join(rates)}" + (" a process." if parts.ranks.world > 1 else "."),
    ]


def other_threads(feed: Feed) -> list[int]:
    """The numbers of threads that a loader is timed with: half, as it is, and all cores."""
    return sorted({max(1, feed.threads // 2), feed.threads, max(feed.threads, feed.cores)})


def rate_alone(batches: Iterator[Batch], images: int, wait: Callable[[], None]) -> float:
    """Images per second of a loader that nobody else keeps waiting.

    Args:
        images: of a batch.
        wait: for the device, where batches are made on it.
    """
    for _ in range(QUEUE + 1):  # what is made ahead while the first one is awaited
        next(batches)
    wait()
    made, start = 0, monotonic()
    while monotonic() < start + SECONDS_ALONE:
        next(batches)
        made += images
    wait()
    return made / (monotonic() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(parts: Parts) -> float:
    """GiB: of the GPU where there is one, else of this process."""
    if parts.ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

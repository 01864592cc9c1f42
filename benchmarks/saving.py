"""What a save costs the steps: for how long it holds them up, and how much slower those beside it are.

    python -m benchmarks.saving --model vit_base_patch16_224 --batch-size 8

    never        steps alone
    waited for   a save that the next step waits for, until it is written, read back and exported
    beside       a save as a run makes it (`engine.training.saving`): the next step waits for the copy alone

In each round every form takes its turn: its save, then the steps of a save interval on images that the engine makes. State,
writer and files are the engine's, so the disk of `--folder` counts, and so do the cores that are free. "held up" is for how long
the save kept the next step waiting. "slower" is how much longer save and interval took than the interval of the same round
without a save: what the writer takes from the steps beside it is in it, and so is what others on the machine did meanwhile. "core
s more" is how much more processor time this process took. Two saves come first, since the very first makes room.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import rounds
from engine.core import dist
from engine.core.errors import BadInput
from engine.core.host_memory import to_device
from engine.training import config
from engine.training.build import build
from engine.training.drawing import drawing
from engine.training.log import RunLog
from engine.training.parts import Parts, prepare
from engine.training.saving import Saving
from engine.training.state import TrainState, content

NEVER, WAITED, BESIDE = "never", "waited for", "beside"
FORMS = (NEVER, WAITED, BESIDE)
WARM_UP = 2  # steps, and saves


@dataclass(frozen=True)
class Options(rounds.Options):
    """Time steps with saves beside them."""

    method: str = "mae"
    """A method of one stage."""
    model: str = "vit_base_patch16_224"
    batch_size: int = 8
    steps: int = 4
    """Steps of a save interval."""
    folder: str = ""
    """Where saves are written; empty is a temporary folder."""


def measure(options: Options) -> dict[str, Any]:
    """Time every form in turn; returns the record."""
    device, precision = rounds.machine(options)
    if options.folder and not Path(options.folder).is_dir():
        raise BadInput(f"--folder is {options.folder!r}, which is no folder.")
    parts = prepare(_plan(options, precision), dist.start(options.device))
    if len(parts.stages) > 1 or parts.ranks.world > 1:
        raise BadInput("one stage in one process is timed: choose another --method, and leave torchrun out.")
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    with (
        tempfile.TemporaryDirectory(dir=options.folder or None) as folder,
        _training(parts) as (state, step),
        Saving(parts, state, Path(folder), RunLog(None, quiet=True)) as saving,
    ):
        for _ in range(WARM_UP):
            step()
        saving.check()
        for _ in range(WARM_UP):
            saving.begin()
            saving.finish()
        for _ in range(options.rounds):
            for form in FORMS:
                found[form].append(one := _interval(form, step, options.steps, saving, device))
                print(form, ", ".join(f"{name} {value:.2f} s" for name, value in one.items()), file=sys.stderr)
        saved = sum(tensor.nbytes for named in content(state).values() for tensor in named.values())
    for never, *others in zip(*found.values()):
        for one in (never, *others):
            one["slower"] = one["seconds"] - never["seconds"]
            one["further_core_seconds"] = one["core_seconds"] - never["core_seconds"]
            one["held_up_of_step"] = one["held_up"] * options.steps / never["seconds"]
            one["slower_of_interval"] = one["slower"] / never["seconds"]
    return rounds.recorded(options, device, precision, found, {"saved_bytes": saved})


def _plan(options: Options, precision: str) -> config.Plan:
    """A run of so many images that no epoch ends while it is timed."""
    steps = WARM_UP + options.rounds * options.steps * len(FORMS)
    flags = ["--method", options.method, "--model", options.model, "--batch-size", str(options.batch_size)]
    flags += ["--data", f"synthetic:{(steps + 1) * options.batch_size}", "--device", options.device]
    flags += ["--precision", precision, "--compile" if options.compile else "--no-compile"]
    return config.parse(flags)


@contextmanager
def _training(parts: Parts) -> Iterator[tuple[TrainState, Callable[[], None]]]:
    """The state of the run's stage, and its next step."""
    state = build(parts, 0, None)
    loader = parts.loader(state)
    with drawing(state.method, partial(parts.draws, 0), 0, parts.stages[0].total_steps) as drawn:

        def step() -> None:
            batch = next(loader)
            ids = to_device(batch.ids, parts.ranks.device)
            state.update(state.step, batch.images, ids, drawn(state.step), logged=False)
            state.step += 1

        try:
            yield state, step
        finally:
            loader.close()


def _interval(form: str, step: rounds.Step, steps: int, saving: Saving, device: torch.device) -> dict[str, float]:
    """Seconds of a save and the steps after it: for which it held them up, of all, and for which it was still written then."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    began, worked = now(), time.process_time()
    if form != NEVER:
        saving.begin()
    if form == WAITED:
        saving.finish()
    held_up = now() - began
    for _ in range(steps):
        step()
        saving.check()
    seconds = now() - began
    saving.finish()
    written_later = now() - began - seconds
    worked = time.process_time() - worked
    return {"held_up": held_up, "seconds": seconds, "written_later": written_later, "core_seconds": worked}


def show(record: dict[str, Any]) -> None:
    options, median = record["options"], record["median"]
    table = Table(
        title=f"a save of {record['saved_bytes'] / 1e9:.2f} GB every {options['steps']} steps: {options['method']} "
        f"{options['model']}, batch {options['batch_size']}, {record['precision']}, {record['threads']} threads, medians of "
        f"{options['rounds']} rounds"
    )
    headings = ("held up (s)", "of a step", "slower (s)", "of interval", "core s more")
    for heading in ("save", "interval (s)", *headings):
        table.add_column(heading, justify="left" if heading == "save" else "right")
    for form, found in median.items():
        cells = [f"{found['held_up']:.2f}", f"{found['held_up_of_step']:.1%}", f"{found['slower']:.2f}"]
        cells += [f"{found['slower_of_interval']:.1%}", f"{found['further_core_seconds']:.2f}"]
        table.add_row(form, f"{found['seconds']:.2f}", *cells)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    return rounds.command(Options, measure, show, arguments, "benchmarks.saving")


if __name__ == "__main__":
    sys.exit(main())

"""Carries a study out, or on: judges what is there, then trains and judges run by run.

Every run is an ordinary run folder, made by `python -m engine.train` in a process of its own. What is done is not done again: a
run with a summary, an evaluation of the same weights. A stopped study goes on where it was; a half-trained run from its
checkpoint. Only when a run's settings are those of today is anything reused.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from engine.core import dist
from engine.core.errors import BadInput
from engine.core.owner import owned
from engine.core.stopping import StopRequest
from engine.data.sources import ImageSet
from engine.studies import Study
from engine.studies.conduct.command_line import Flags
from engine.studies.conduct.course import Course
from engine.studies.conduct.grid import HALF, grid, length
from engine.studies.conduct.judge import Judge, protocols
from engine.studies.conduct.report import table, write
from engine.training.parts import prepare

POLL, LINE_EVERY = 0.5, 60.0  # seconds


def run(flags: Flags, study: Study, console: Console, again: str) -> int:
    """Carry the study out, or on; `again` is the command that was given.

    Returns:
        0 when it ended or was stopped on request, 1 where runs failed, or what comes after them did.

    Raises:
        BadInput: flags, data or folders cannot be used; nothing is written then.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput("engine.study starts its own processes; start it without torchrun.")

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    chosen = {
        name: getattr(flags, name)
        for name in ("data", "model", "image_size", "patch_size", "epochs", "batch_size", "seeds", "arms", "collapse")
    }
    folder = Path(flags.out).expanduser() / "runs"
    course = Course(flags, study, grid(study, folder, **chosen), say)
    ranks = dist.start(flags.device)
    parts = None
    for arm in {run.arm.name: run.arm for run in course.runs}.values():
        of_arm = [run for run in course.runs if run.arm == arm]
        plan = of_arm[0].plan
        if of_arm[0].after:  # its weights are not there yet
            plan = replace(plan, train=replace(plan.train, weights=""))
        parts = prepare(plan, ranks)  # what engine.train would refuse is refused before anything runs
        last = parts.stages[-1]
        course.steps |= {run.name: last.first_step + last.total_steps for run in of_arm}
    if parts.val_images is None:
        raise BadInput(
            f"--data {flags.data} has no val split to judge on; give a folder with train/CLASS and val/CLASS."
        )
    images = (parts.train_images, parts.val_images)
    judge = Judge(
        images,
        protocols(study, images, say),
        course.extras,
        ranks.device,
        parts.precision,
        flags.threads or None,
        flags.data,
    )
    with owned(course.out, say) as lock, StopRequest() as stop, stop.deferred(), _threads_of_torch(course.threads):
        course.look()  # again, now that nobody else can be at it
        _introduce(course, images, say)
        try:
            _carry_out(course, judge, lock, stop, console)
        finally:
            if course.active:
                say("stopping: what is being trained is saved")
            course.stop()
        if stop.raised:
            say(f"stopped; the same command goes on: {again}")
            return 0
    outcome = course.outcome(images)
    write(course.out, outcome, course.extras)  # once more, with what failed last
    console.print(table(outcome))
    for note in outcome.notes:
        say(note)
    say(f"table, figure and every number: {course.out}")
    return 1 if course.failed or course.extras.left_out else 0


def _introduce(course: Course, images: tuple[ImageSet, ImageSet], say: Callable[[str], None]) -> None:
    """What will be run, and what is there already."""
    plan = course.runs[0].plan
    what = f"{_count(len(course.runs), 'run')} of {length(course.runs)}"
    on = f"{plan.model} on {len(images[0]):,} images, judged on {len(images[1]):,}"
    say(f"study {course.study.name}: {what}, {on}; folder {course.out}")
    width = max(len(run.name) for run in course.runs)
    for run in course.runs:
        state = course.standing[run.name]
        where = f", goes on from step {course.saved[run.name]}" if state == HALF else ""
        say(f"  {run.name:{width}}  {state}{where}")


def _carry_out(course: Course, judge: Judge, lock: int, stop: StopRequest, console: Console) -> None:
    """Judge what is there, then train and judge run by run; the outcome so far is written each time."""
    bar = Progress(
        BarColumn(24),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        shown = bar.add_task("judging what is there")
        for measure in (
            *course.yardsticks(judge),
            *(lambda run=run: course.judge(run, judge) for run in course.done()),
        ):
            if stop.raised:
                return
            measure()
        write(course.out, course.outcome(judge.images), course.extras)
        next_line = time.monotonic() + LINE_EVERY
        while (waiting := course.waiting()) or course.missing() or course.active:
            for run in waiting[: course.flags.jobs - len(course.active)]:
                course.start(run, lock)
            time.sleep(POLL)
            if stop.raised:
                return
            for run in course.collect():
                course.judge(run, judge)
                write(course.out, course.outcome(judge.images), course.extras)
            done, total, words = course.progress()
            bar.update(shown, completed=done, total=total, description=words)
            if not console.is_terminal and time.monotonic() > next_line:
                course.say(words)
                next_line = time.monotonic() + LINE_EVERY


@contextmanager
def _threads_of_torch(threads: int) -> Iterator[None]:
    """Inside, this process computes on so many threads: judging takes the share of one training."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

"""`python -m engine.study NAME`: train a grid of pretext tasks, judge each alike, leave a table and a figure.

Every run is an ordinary run folder, made by `python -m engine.train` in a process of its own. What is done is not done again: a
run with a summary, an evaluation of the same weights. A stopped study goes on where it was; a half-trained run from its
checkpoint. Only when a run's settings are those of today is anything reused.
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tyro.conf import Positional

from engine import studies
from engine.core import dist
from engine.core.draws import seed_of
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.data.sources import ImageSet
from engine.evals.features import encoder_of, raw_pixels
from engine.model import vit, weights
from engine.studies import Study
from engine.studies.grid import (
    DONE,
    HALF,
    Run,
    encoders_differ,
    grid,
    logged_step,
    saved_step,
    standing,
    trained_seconds,
)
from engine.studies.judge import Judge, protocols
from engine.studies.report import Judged, Outcome, table, write
from engine.training.loop import StopRequest
from engine.training.parts import prepare

POLL, LINE_EVERY = 0.5, 60.0  # seconds


@dataclass(frozen=True)
class Flags:
    """Train a grid of pretext tasks, judge each alike, write one table and one figure. Run it again to go on: what is done is not
    repeated."""

    study: Annotated[Positional[str], tyro.conf.arg(help=f"Which study: {', '.join(studies.names())}.")] = ""
    data: str = ""
    """An image folder: train/CLASS/*.jpg and val/CLASS/*.jpg; or NAME:DIR, a published set as it lies in DIR, with NAME one of
    cifar10, cifar100, svhn, flowers102, tiny-imagenet, imagenet100. Default: the embedded digits."""
    model: str = ""
    """A timm ViT name; default vit_micro_patch8_32 on the embedded digits, vit_base_patch16_224 on a folder, and ViT-S with the
    set's image and patch size on a published set."""
    epochs: int = 0
    """Of every run, in a study of equal conditions; 0 is the study's own on the embedded digits, and the recipe's on a folder."""
    batch_size: int = 0
    """Images of a step, for every run; 0 is the recipe's."""
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once with each."""
    arms: tuple[str, ...] = ()
    """Only these pretext tasks; default: all of the study's."""
    collapse: tuple[str, ...] = ()
    """Only these ways to keep prototypes from collapsing; default: all of the study's."""
    out: str = ""
    """Folder of the study; default studies/NAME. An earlier one there is gone on with."""
    jobs: int = 1
    """Runs side by side, each in a process of its own."""
    threads: int = 0
    """CPU threads of all of them together; 0 is what the machine has."""
    compile: bool = False
    """Compile blocks and losses with torch.compile."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def check(self, study: Study) -> None:
        """Raise BadInput for a value that cannot be meant."""
        for name, least in {"epochs": 0, "batch_size": 0, "jobs": 1, "threads": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more.")
        if not self.seeds or min(self.seeds) < 0:
            raise BadInput("--seeds takes one whole number or more, each from 0.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise BadInput(f"--device is {self.device!r}; choose one of auto, cpu, cuda.")
        for name in self.arms:
            study.arm(name)
        for name in self.collapse:
            if not study.collapse:
                raise BadInput(f"--collapse is not for study {study.name}, where every arm has its own recipe's.")
            if name not in study.collapse:
                raise BadInput(f"--collapse has {name!r}; choose from {', '.join(study.collapse)}.")
        for name in ("seeds", "arms", "collapse"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise BadInput(f"--{name} names something twice.")


def parse(arguments: Sequence[str], find: Callable[[str], Study] = studies.get) -> tuple[Flags, Study]:
    """Command-line arguments -> checked flags, and the study they name.

    Raises:
        BadInput: a flag or study does not exist, or a value is not valid.
        SystemExit: status 0 after --help.
    """
    flags = read(Flags, arguments, prog="engine.study", description=" ".join(Flags.__doc__.split()))
    if not flags.study:
        raise BadInput(f"no study is named; choose one of {', '.join(studies.names())}.")
    study = find(flags.study)
    flags.check(study)
    return replace(flags, out=flags.out or f"studies/{study.name}"), study


@dataclass
class Training:
    """A run that is being trained by a process of its own."""

    run: Run
    slot: int
    process: subprocess.Popen
    folder: Path
    log: Path
    first_step: int
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def step(self) -> int:
        return max(self.first_step, logged_step(self.folder))

    def complaint(self) -> str:
        """Why it ended, by the last words of its log."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        last = error.removeprefix("error: ") if error else (lines[-1] if lines else "it said nothing")
        return f"status {self.process.returncode}: {last}"


class Course:
    """A study under way: which runs wait, run, are done or failed, and how long the rest will take."""

    def __init__(self, flags: Flags, study: Study, runs: list[Run], say: Callable[[str], None]):
        self.flags, self.study, self.runs, self.say = flags, study, runs, say
        self.out = Path(flags.out).expanduser()
        self.threads = max(1, (flags.threads or torch.get_num_threads()) // flags.jobs)
        self.look()
        self.failed: dict[str, str] = {}
        self.judged: dict[str, Judged] = {}
        self.steps: dict[str, int] = {}
        self.pace: dict[str, tuple[float, int]] = {}
        self.active: list[Training] = []

    def look(self) -> None:
        """See what there is.

        Raises:
            BadInput: a run's folder holds something else.
        """
        self.standing = {run.name: standing(run, self.folder(run)) for run in self.runs}
        half = [run for run in self.runs if self.standing[run.name] == HALF]
        self.saved = {run.name: saved_step(self.folder(run)) for run in half}  # kept, since it reads whole checkpoints

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def command(self, run: Run) -> str:
        """What repeats a run."""
        return shlex.join(["python", "-m", "engine.train", *run.arguments, "--out", str(self.folder(run))])

    def missing(self) -> list[Run]:
        """The runs that are neither done, under way nor failed."""
        running = {training.run.name for training in self.active}
        taken = running | self.failed.keys()
        return [run for run in self.runs if self.standing[run.name] != DONE and run.name not in taken]

    def waiting(self) -> list[Run]:
        """Those of the missing ones that can start; what was to follow a failed run is noted as failed, too."""
        for run in self.missing():
            if run.after in self.failed:
                self.failed[run.name] = f"{run.after}, which it starts from, failed"
        return [run for run in self.missing() if not run.after or self.standing[run.after] == DONE]

    def start(self, run: Run, lock: int) -> None:
        """Train a run in a new process, from where it is. The process holds the study's lock too."""
        folder, log = self.folder(run), self.out / "logs" / f"{run.name}.log"
        how = ["--compile" if self.flags.compile else "--no-compile", "--device", self.flags.device]
        if self.flags.threads or self.flags.jobs > 1:
            how += ["--threads", str(self.threads)]
        if self.standing[run.name] == HALF:
            words, first = [*how, "--resume", str(folder)], self.saved[run.name]
        else:
            if folder.exists():  # killed before its first checkpoint
                shutil.rmtree(folder)
            words, first = [*run.arguments, *how, "--out", str(folder)], 0
        slot = next(n for n in range(self.flags.jobs) if n not in {training.slot for training in self.active})
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"$ {shlex.join(['python', '-m', 'engine.train', *words])}\n")
            file.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "engine.train", *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment(slot, self.threads), start_new_session=True, pass_fds=(lock,),
            )  # fmt: skip
        self.active.append(Training(run, slot, process, folder, log, first))
        self.say(f"{run.name}: {'goes on from step ' + str(first) if first else 'starts'}")

    def collect(self) -> list[Run]:
        """The runs that ended since the last call and are done; those that failed are noted."""
        ended = [training for training in self.active if training.process.poll() is not None]
        done = []
        for training in ended:
            self.active.remove(training)
            name = training.run.name
            self.standing[name] = standing(training.run, training.folder)
            if self.standing[name] == DONE:
                seconds, steps = self.pace.get(training.run.arm.name, (0.0, 0))
                trained = self.steps[name] - training.first_step
                self.pace[training.run.arm.name] = seconds + training.seconds, steps + trained
                done.append(training.run)
                self.say(f"{name}: trained in {_duration(training.seconds)}")
            else:
                self.failed[name] = training.complaint()
                self.say(f"{name} failed: {self.failed[name]} (whole log: {training.log})")
        return done

    def stop(self) -> None:
        """Ask every training to save and end, and wait for it."""
        for training in self.active:
            if training.process.poll() is None:
                training.process.send_signal(signal.SIGTERM)
        for training in self.active:
            training.process.wait()
        self.active.clear()

    def done(self) -> list[Run]:
        return [run for run in self.runs if self.standing[run.name] == DONE]

    def yardsticks(self, judge: Judge) -> list[Callable[[], None]]:
        """What gives the yardsticks: raw pixels, and each seed's encoder as it is before training."""
        plan, folder = self.runs[0].plan, self.out / "yardsticks"

        def pixels() -> None:
            encoder = raw_pixels(vit.create(plan.model, **plan.encoder).img_size)
            figures = judge.figures("raw pixels", encoder, folder / "raw-pixels", "raw")
            self.judged["raw pixels"] = Judged("raw pixels", None, None, figures)

        def untrained(seed: int) -> None:
            torch.manual_seed(seed_of(seed, "encoder"))  # as engine.train does
            encoder = encoder_of(vit.create(plan.model, **plan.encoder).to(judge.device))
            figures = judge.figures("untrained", encoder, folder / f"untrained-s{seed}")
            self.judged[f"untrained-s{seed}"] = Judged("untrained", None, seed, figures)

        return [pixels, *(partial(untrained, seed) for seed in self.flags.seeds)]

    def judge(self, run: Run, judge: Judge) -> None:
        """Evaluate a run that is done."""
        folder = self.folder(run)
        summary = json.loads((folder / "summary.json").read_text())
        verdict = next((probe["verdict"] for probe in reversed(summary["probes"]) if "verdict" in probe), "")
        figures: dict[str, list[float]] = {}
        try:
            model, _ = weights.create(folder)
            encoder = encoder_of(model.to(judge.device))
            figures = judge.figures(run.name, encoder, folder / "evaluation", str(folder))
        except BadInput as error:
            verdict = f"broken: {error}"
        own = summary["probes"][-1].get("top1") if self.study.classifies else None
        if own is not None:
            figures = {"classifier": [own / 100]} | figures
        seconds = trained_seconds(folder)
        self.judged[run.name] = Judged(
            run.arm.name, run.collapse, run.seed, figures, verdict, self.command(run), seconds
        )
        if figures:
            self.say(
                f"{run.name}: " + ", ".join(f"{name} {100 * mean(values):.1f} %" for name, values in figures.items())
            )

    def outcome(self, images: tuple[ImageSet, ImageSet]) -> Outcome:
        """What there is so far, runs that are missing as such."""
        missing = {
            run.name: f"failed: {self.failed[run.name]}" if run.name in self.failed else "not done yet"
            for run in self.runs
        }
        judged = [
            self.judged.get(
                run.name, Judged(run.arm.name, run.collapse, run.seed, {}, missing[run.name], self.command(run))
            )
            for run in self.runs
        ]
        yardsticks = [found for found in self.judged.values() if found.collapse is None]
        about = (
            f"{self.runs[0].plan.model} on {self.flags.data or 'the embedded digits'} ({len(images[0]):,} training and "
            f"{len(images[1]):,} test images), {_length(self.runs)}, "
            f"seed{'s' * (len(self.flags.seeds) > 1)} {' '.join(map(str, self.flags.seeds))}"
        )
        return Outcome(self.study, about, tuple(judged), tuple(yardsticks), encoders_differ(self.runs))

    def progress(self) -> tuple[int, int, str]:
        """Steps done, steps in all, and both in words with the time left."""
        steps = {name: count if self.standing[name] == DONE else 0 for name, count in self.steps.items()}
        steps |= {run.name: self.saved[run.name] for run in self.waiting() if run.name in self.saved}
        steps |= {training.run.name: training.step() for training in self.active}
        done = sum(state == DONE for state in self.standing.values())
        words = [f"{done} of {len(self.runs)} runs done"]
        words += [f"{t.run.name} {steps[t.run.name]:,} of {self.steps[t.run.name]:,} steps" for t in self.active]
        left = self._seconds_left(steps)
        words += [f"about {_duration(left)} left"] if left is not None else []
        return sum(steps.values()), sum(self.steps.values()), " · ".join(words)

    def _seconds_left(self, steps: dict[str, int]) -> float | None:
        """By the pace of each arm, of runs that are done and running; None while there is none."""
        pace = dict(self.pace)
        for training in self.active:
            seconds, count = pace.get(training.run.arm.name, (0.0, 0))
            made = steps[training.run.name] - training.first_step
            if made:
                pace[training.run.arm.name] = seconds + training.seconds, count + made
        if not pace:
            return None
        everyone = sum(seconds for seconds, _ in pace.values()) / sum(count for _, count in pace.values())
        rates = {arm: seconds / count for arm, (seconds, count) in pace.items()}
        left = [
            (self.steps[run.name] - steps[run.name]) * rates.get(run.arm.name, everyone)
            for run in self.runs
            if self.standing[run.name] != DONE and run.name not in self.failed
        ]
        return max(max(left, default=0.0), sum(left) / self.flags.jobs)


def environment(slot: int, threads: int) -> dict[str, str]:
    """Of a training process: its share of the CPU's threads, and where there are several GPUs one of them."""
    given = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if torch.cuda.device_count() > 1:
        visible = (
            os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        ).split(",")
        given["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    return given


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """Inside, this process computes on so many threads: judging takes the share of one training."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Holds the study's folder, which is made if missing; gives the descriptor, which a training process keeps open as well: a
    study that was killed is not begun again beside a training that it left behind.

    Raises:
        BadInput: somebody else holds it, or it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / ".lock").open("a")
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written ({error.strerror}); choose another folder.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(
                f"--out {out} is at work: another study, or a training that one left behind; wait for it."
            ) from error
        yield handle.fileno()


def run(flags: Flags, study: Study, console: Console, again: str) -> int:
    """Carry the study out, or on; `again` is the command that was given.

    Returns:
        0 when it ended or was stopped on request, 1 where runs failed.

    Raises:
        BadInput: flags, data or folders cannot be used; nothing is written then.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput("engine.study starts its own processes; start it without torchrun.")

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    chosen = {
        name: getattr(flags, name) for name in ("data", "model", "epochs", "batch_size", "seeds", "arms", "collapse")
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
        images, protocols(study, images, say), ranks.device, parts.precision, flags.threads or None, flags.data
    )
    with locked(course.out) as lock, StopRequest() as stop, threads_of_torch(course.threads):
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
    write(course.out, outcome)  # once more, with what failed last
    console.print(table(outcome))
    for note in outcome.notes:
        say(note)
    say(f"table, figure and every number: {course.out}")
    return 1 if course.failed else 0


def _introduce(course: Course, images: tuple[ImageSet, ImageSet], say: Callable[[str], None]) -> None:
    """What will be run, and what is there already."""
    plan = course.runs[0].plan
    what = f"{_count(len(course.runs), 'run')} of {_length(course.runs)}"
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
        write(course.out, course.outcome(judge.images))
        next_line = time.monotonic() + LINE_EVERY
        while (waiting := course.waiting()) or course.missing() or course.active:
            for run in waiting[: course.flags.jobs - len(course.active)]:
                course.start(run, lock)
            time.sleep(POLL)
            if stop.raised:
                return
            for run in course.collect():
                course.judge(run, judge)
                write(course.out, course.outcome(judge.images))
            done, total, words = course.progress()
            bar.update(shown, completed=done, total=total, description=words)
            if not console.is_terminal and time.monotonic() > next_line:
                course.say(words)
                next_line = time.monotonic() + LINE_EVERY


def _length(runs: Sequence[Run]) -> str:
    """Epochs and batch of these runs, in words."""
    epochs = _range(run.epochs for run in runs)
    batch = _range(settings.batch_size for run in runs for _, settings in run.plan.stages)
    return f"{epochs} epoch{'s' * (epochs != '1')} in batches of {batch}"


def _range(numbers: Iterable[int]) -> str:
    numbers = sorted(set(numbers))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def main(arguments: Sequence[str] | None = None, find: Callable[[str], Study] = studies.get) -> int:
    """The command. Returns the exit status: as of `run`, or 2 for input that cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        flags, study = parse(arguments, find)
        return run(flags, study, Console(), shlex.join(["python", "-m", "engine.study", *arguments]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

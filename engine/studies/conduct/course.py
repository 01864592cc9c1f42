"""A study under way: which runs wait, run, are done or failed, what they were judged, how long the rest will take."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from engine.core.draws import seed_of
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.data.sources import ImageSet
from engine.evals.features import encoder_of, raw_pixels
from engine.model import vit, weights
from engine.studies import Study
from engine.studies.conduct.command_line import Flags
from engine.studies.conduct.grid import (
    DONE,
    HALF,
    Run,
    encoders_differ,
    length,
    saved_step,
    standing,
    trained_seconds,
)
from engine.studies.conduct.judge import Judge
from engine.studies.conduct.outcome import Judged, Outcome
from engine.studies.conduct.trainings import Training, environment


class Course:
    """A study under way: which runs wait, run, are done or failed, and how long the rest will take."""

    def __init__(self, flags: Flags, study: Study, runs: list[Run], say: Callable[[str], None]):
        self.flags, self.study, self.runs, self.say = flags, study, runs, say
        self.extras = Extras(say)
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
            with self.extras.of("judging raw pixels"):
                figures = judge.figures("raw pixels", encoder, folder / "raw-pixels", "raw")
                self.judged["raw pixels"] = Judged("raw pixels", None, None, figures)

        def untrained(seed: int) -> None:
            torch.manual_seed(seed_of(seed, "encoder"))  # as engine.train does
            encoder = encoder_of(vit.create(plan.model, **plan.encoder).to(judge.device))
            with self.extras.of(f"judging the untrained encoder of seed {seed}"):
                figures = judge.figures("untrained", encoder, folder / f"untrained-s{seed}")
                self.judged[f"untrained-s{seed}"] = Judged("untrained", None, seed, figures)

        return [pixels, *(partial(untrained, seed) for seed in self.flags.seeds)]

    def judge(self, run: Run, judge: Judge) -> None:
        """Evaluate a run that is done; the study goes on where that fails."""
        with self.extras.of(_judging(run)):
            self.judged[run.name] = found = self._judged(run, judge)
            if found.figures:
                means = {name: 100 * mean(values) for name, values in found.figures.items()}
                self.say(f"{run.name}: " + ", ".join(f"{name} {value:.1f} %" for name, value in means.items()))

    def _judged(self, run: Run, judge: Judge) -> Judged:
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
        seconds, operations = trained_seconds(folder), summary.get("operations")  # earlier versions counted none
        whole = sum(operations.values()) if operations else None
        return Judged(run.arm.name, run.collapse, run.seed, figures, verdict, self.command(run), seconds, whole)

    def outcome(self, images: tuple[ImageSet, ImageSet]) -> Outcome:
        """What there is so far, runs that are missing as such."""
        failed = self.failed | {
            run.name: self.extras.left_out[_judging(run)] for run in self.runs if _judging(run) in self.extras.left_out
        }
        missing = {
            run.name: f"failed: {failed[run.name]}" if run.name in failed else "not done yet" for run in self.runs
        }
        judged = [
            self.judged.get(
                run.name, Judged(run.arm.name, run.collapse, run.seed, {}, missing[run.name], self.command(run))
            )
            for run in self.runs
        ]
        yardsticks = [found for found in self.judged.values() if found.collapse is None]
        plan, flags = self.runs[0].plan, self.flags
        model = plan.model
        if flags.image_size or flags.patch_size:
            encoder = vit.without_memory(model, **plan.encoder)
            height, width = encoder.img_size
            model += f" of {height} x {width} pixels in patches of {encoder.patch_size}"
        about = (
            f"{model} on {flags.data or 'the embedded digits'} ({len(images[0]):,} training and {len(images[1]):,} test images), "
            f"{length(self.runs)}, seed{'s' * (len(flags.seeds) > 1)} {' '.join(map(str, flags.seeds))}"
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


def _judging(run: Run) -> str:
    return f"judging {run.name}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )

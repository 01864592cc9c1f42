"""What a run leaves to read and shows while it trains: the one thing the loop talks to.

It hands on to metrics.jsonl (the record), events.jsonl (what became of the run), TensorBoard and the trackers that were asked
for, a progress display, and summary.json.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import SEEK_END
from pathlib import Path
from time import time

from rich.console import Console

from engine.core.durable import write_file
from engine.training.metrics import KINDS, RESERVED, MetricsFile, keep_until, strict
from engine.training.progress import Progress, Stretch
from engine.training.speed import Speed
from engine.training.trackers import TensorBoard, Trackers

EVENTS = "events.jsonl"
LONG_FIRST_STEP = 5.0  # seconds from which it is told


class RunLog:
    """Record and progress display of one run. On any rank but 0 every method returns at once.

    Args:
        folder: the run folder; None for a dry run, which writes nothing.
        rank: this process's rank.
        flops_per_image: floating-point operations the model needs per image, forward and backward.
        peak_flops: peak FLOP/s of all devices of the run together; MFU is known only with both.
        track: where to show the numbers besides (`engine.training.trackers`); the folder then holds a config.json.
        quiet: show nothing; files are written all the same.
        console: where to show progress, by default standard output; a terminal gets a live bar, all else plain lines.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        rank: int = 0,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        track: Sequence[str] = (),
        quiet: bool = False,
        console: Console | None = None,
    ):
        self.folder = folder
        self._flops_per_image = flops_per_image
        self._active = rank == 0
        self._speed = Speed(peak_flops)
        self._progress = Progress(console or Console(), shown=self._active and not quiet)
        self._trackers = Trackers(track, self.message)
        self._file: MetricsFile | None = None
        self._board: TensorBoard | None = None
        self._step = 0
        self._resumed_at: int | None = None
        self._left_out: int | None = (
            0  # updates of the stage that were told; None where a run goes on and it isn't known yet
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, global_step: int) -> None:
        """Forget what was logged past a checkpoint: lines of later steps go, and so does a line torn by the crash.

        Call it before the first `start_stage`. TensorBoard hides its events past the checkpoint.
        """
        if not self._active:
            return
        self._step = self._resumed_at = global_step
        if self.folder is not None and (self.folder / "metrics.jsonl").exists():
            keep_until(self.folder / "metrics.jsonl", global_step)

    def start_stage(
        self,
        name: str,
        index: int,
        count: int,
        start_step: int,
        total_steps: int,
        images_per_step: int,
        *,
        flops_per_image: float | None = None,
    ) -> None:
        """Begin (or, after `resume`, go on with) a stage.

        Args:
            name: what the lines of this stage are marked with.
            index: position among the stages, from 0.
            count: stages of the run.
            start_step: updates finished before this stage, those of earlier stages included.
            total_steps: updates of this stage alone.
            images_per_step: the global batch, at its next step.
            flops_per_image: of this stage, where it differs from the run's.
        """
        if not self._active:
            return
        self._progress.end()
        if self.folder is not None and self._file is None:
            self._open()
        self._step = max(self._step, start_step)
        self._left_out = 0 if self._step == start_step else None
        self._speed.begin(images_per_step, self._flops_per_image if flops_per_image is None else flops_per_image)
        self._progress.begin(Stretch(name, index, count, start_step, total_steps), self._step, images_per_step)

    def cost(self, images_per_step: int, flops_per_image: float) -> None:
        """How many images a step has from here on, and what each costs, where that changes within a stage."""
        if self._active:
            self._speed.cost(self._step, images_per_step, flops_per_image)

    def tick(self, step: int) -> None:
        """Say that `step` updates are finished. Cheap: no file, no tensor, no wait for the device."""
        if not self._active or self._progress.stage is None:
            return
        self._step = step
        first = self._speed.tick(step)
        self._progress.tick(step)
        if first is not None and first >= LONG_FIRST_STEP:
            self.message(f"the first step took {first:.0f} s, compilation included; the others do not")

    def log(
        self, step: int, values: Mapping[str, float | str], *, kind: str = "train", waited: float | None = None
    ) -> None:
        """Record the values of a step: one line of metrics.jsonl, TensorBoard, the trackers, the progress display.

        Lines of kind "train" also get images_per_second (since the previous one, time in `aside` left out; absent for
        the first update of a stage) and, where peak and cost are known, mfu between 0 and 1; where `waited` is given,
        waiting_for_data, its share of that time.

        Args:
            step: finished updates through all stages.
            values: numbers by name, read here (a tensor on a device would be waited for), or words such as a verdict.
                A number that isn't finite is written as null and named under "not_finite".
            kind: "train", "probe" or "event"; the latter two are shown above the bar.
            waited: seconds that steps waited for images since the previous line of kind "train".

        Raises:
            ValueError: unknown kind, or a value named like one of the line's own fields.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown; it is one of {', '.join(KINDS)}")
        if clash := sorted(set(values) & set(RESERVED)):
            raise ValueError(f"{', '.join(clash)} cannot be logged: the line has fields of this name")
        if not self._active:
            return
        values = {name: value if isinstance(value, str | int) else float(value) for name, value in values.items()}
        if kind == "train":
            values |= self._speed.rates(step, waited)
            self._progress.show({name: value for name, value in values.items() if not isinstance(value, str)})
            self.tick(step)
            self._tell_left_out(step, int(values.get("skipped_updates", 0)))
        else:
            self._progress.report(kind, step, values)
        if self.folder is not None:
            self._write(step, values, kind)

    def _tell_left_out(self, step: int, count: int) -> None:
        if self._left_out is not None and count > self._left_out:
            new = count - self._left_out
            self.note(
                "updates left out", f"{new} updates up to step {step:,} were left out: loss or gradients not finite"
            )
        self._left_out = count

    def speed(self) -> dict[str, float]:
        """images_per_second and waiting_for_data of the stage, as far as this process has trained and logged it."""
        return self._speed.of_stage() if self._active else {}

    def message(self, text: str) -> None:
        """Print one line above the bar."""
        self._progress.message(text)

    def note(self, event: str, words: str, *, shown: bool = True, **more: object) -> None:
        """What became of the run: a line of events.jsonl, which is only ever added to, also by those who go on with the run.

        Args:
            event: its kind, such as "resumed".
            words: a sentence, also printed where it is `shown`.
            more: further fields of the line, JSON-like.
        """
        if not self._active:
            return
        if shown:
            self.message(words)
        if self.folder is not None and self.folder.is_dir():
            line = {"time": round(time(), 3), "event": event, "step": self._step, "words": words, **more}
            with suppress(OSError):  # of a disk that fails, the error itself tells
                _add_line(self.folder / EVENTS, json.dumps(strict(line)))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside (a probe, a picture, what a save holds up) is left out of images per second.

        Enter it when the device is idle, for example after `log`, or queued training steps count as time aside.
        """
        with self._speed.aside():
            yield

    def close(self, summary: Mapping | None = None) -> None:
        """End the display and close the files; with a summary, write summary.json (durable, aside and renamed)."""
        if not self._active:
            return
        stage = self._progress.stage
        whole = stage is not None and stage.index + 1 == stage.count and self._step == stage.end_step
        self._progress.end()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None
        self._trackers.close(whole)
        if summary is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(strict(summary), indent=2, allow_nan=False, default=str) + "\n"
            write_file(self.folder / "summary.json", lambda aside: aside.write_text(text))

    def _write(self, step: int, values: dict[str, float | str], kind: str) -> None:
        if self._file is None:
            self._open()
        now, stage = time(), self._progress.stage
        record = {"step": step, "stage": stage.name if stage else "", "kind": kind, "time": round(now, 3)}
        self._file.append(record | values)
        self._board.log(step, kind, values, now)
        self._trackers.log(step, kind, values, now)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(self.folder / "metrics.jsonl")
        self._board = TensorBoard(self.folder / "tensorboard", self._resumed_at)
        self._trackers.open(self.folder)


def _add_line(path: Path, line: str) -> None:
    """At the end of a file, whose last line a crash may have torn."""
    with path.open("ab+") as file:
        if size := file.seek(0, SEEK_END):
            file.seek(size - 1)
        torn = size and file.read(1) != b"\n"
        file.write(b"\n" * bool(torn) + line.encode() + b"\n")

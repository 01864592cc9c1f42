"""What a run leaves to read and shows while it trains: metrics.jsonl, TensorBoard, a progress display, summary.json.

metrics.jsonl is the record: one strict JSON object per line, append only, each line handed to the system in one
write, so that a crash leaves whole lines. TensorBoard shows the same numbers. Steps count finished updates through all
stages, from 1; a checkpoint of step g holds g updates. Whatever belongs to step g is logged before that checkpoint is
taken: then a resumed run's file equals an uninterrupted one's, but for `TIME_FIELDS`.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from time import monotonic, time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.core.durable import write_file

TIME_FIELDS = ("time", "images_per_second", "mfu")
RESERVED = ("step", "stage", "kind", "not_finite", *TIME_FIELDS)
KINDS = ("train", "probe", "event")

# Dense bf16 tensor-core peaks per GPU in FLOP/s. Hopper's data sheets print them "with sparsity": twice these.
PEAKS = (
    (r"\bA100\b", 312e12),  # NVIDIA A100 data sheet, SXM and PCIe alike
    (r"\bH[12]00 NVL\b", 835e12),  # NVIDIA H100 and H200 data sheets, NVL: 1,671 TFLOPS with sparsity
    (r"\bH100 PCIe\b", 756e12),  # NVIDIA H100 data sheet, PCIe: 1,513 with sparsity
    (r"\bH[12]00\b", 989e12),  # NVIDIA H100 and H200 data sheets, SXM: 1,979 with sparsity
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one GPU in FLOP/s by its name (`torch.cuda.get_device_name()`), None where no figure is known.

    A slice of a GPU (MIG) is unknown: its share of the peak isn't in the name.
    """
    if " MIG " in device_name:
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, oldest first; a line torn by a crash, or still being written, is left out."""
    return [record for record in map(_parsed, path.read_bytes().splitlines()) if record is not None]


@dataclass(frozen=True)
class _Stage:
    name: str
    index: int
    count: int
    start_step: int
    total_steps: int
    images_per_step: int
    flops_per_image: float | None

    @property
    def title(self) -> str:
        return f"stage {self.index + 1}/{self.count} {self.name}" if self.count > 1 else self.name


class RunLog:
    """Record and progress display of one run. On any rank but 0 every method returns at once.

    Args:
        folder: the run folder; None for a dry run, which writes nothing.
        rank: this process's rank.
        flops_per_image: floating-point operations the model needs per image, forward and backward.
        peak_flops: peak FLOP/s of all devices of the run together; MFU is known only with both.
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
        quiet: bool = False,
        console: Console | None = None,
    ):
        self.folder = folder
        self.peak_flops = peak_flops
        self._flops_per_image = flops_per_image
        self._active = rank == 0
        self._shown = self._active and not quiet
        self._console = console or Console()
        self._live: Live | None = None
        self._file = None
        self._board = None
        self._stage: _Stage | None = None
        self._step = 0
        self._resumed_at: int | None = None
        self._paused = 0.0
        self._clock_mark: tuple[float, int] | None = None
        self._latest: dict[str, float] = {}

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
            _keep_until(self.folder / "metrics.jsonl", global_step)

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
            images_per_step: the global batch.
            flops_per_image: of this stage, where it differs from the run's.
        """
        if not self._active:
            return
        self._end_stage()
        if self.folder is not None and self._file is None:
            self._open()
        flops = flops_per_image if flops_per_image is not None else self._flops_per_image
        self._stage = _Stage(name, index, count, start_step, total_steps, images_per_step, flops)
        self._step = max(self._step, start_step)
        self._latest = {}
        self._clock_mark = None
        self._stage_began = self._first_tick = monotonic()
        self._first_step = self._shown_step = self._step
        self._next_line = self._stage_began + 10
        first = f"step {self._step + 1:,} to {start_step + total_steps:,}, {images_per_step} images a step"
        self.message(f"{self._stage.title}: {first}" + (" (resumed)" if self._step > start_step else ""))
        if self._shown and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._display, refresh_per_second=4, transient=True)
            self._live.start()

    def tick(self, step: int) -> None:
        """Say that `step` updates are finished. Cheap: no file, no tensor, no wait for the device."""
        if not self._active or self._stage is None:
            return
        self._step = step
        if self._clock_mark is None:
            # A stage's first update compiles and loads kernels: rates are measured from its end on.
            self._clock_mark = (self._clock(), step)
            self._first_tick, self._first_step = monotonic(), step
        elif self._shown and self._live is None and monotonic() >= self._next_line:
            self._print_line()

    def log(self, step: int, values: Mapping[str, float | str], *, kind: str = "train") -> None:
        """Record the values of a step: one line of metrics.jsonl, TensorBoard, the progress display.

        Lines of kind "train" also get images_per_second (since the previous one, time in `aside` left out; absent for
        the first update of a stage) and, where peak and cost are known, mfu between 0 and 1.

        Args:
            step: finished updates through all stages.
            values: numbers by name, read here (a tensor on a device would be waited for), or words such as a verdict.
                A number that isn't finite is written as null and named under "not_finite".
            kind: "train", "probe" or "event"; the latter two are shown above the bar.

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
            values |= self._rates(step)
            first, self._latest = not self._latest, {n: v for n, v in values.items() if not isinstance(v, str)}
            self._next_line = 0.0 if first else self._next_line
            self.tick(step)
        else:
            self.message(f"{kind} at step {step:,}: {_in_words(values)}")
        if self.folder is not None:
            self._write(step, values, kind)

    def message(self, text: str) -> None:
        """Print one line above the bar."""
        if self._shown:
            self._console.out(text, highlight=False)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside (a probe, a picture, a blocking save) is left out of images per second.

        Enter it when the device is idle, for example after `log`, or queued training steps count as time aside.
        """
        began = monotonic()
        try:
            yield
        finally:
            self._paused += monotonic() - began

    def close(self, summary: Mapping | None = None) -> None:
        """End the display and close the files; with a summary, write summary.json (durable, aside and renamed)."""
        if not self._active:
            return
        self._end_stage()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None
        if summary is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(_strict(dict(summary)), indent=2, allow_nan=False, default=str) + "\n"
            write_file(self.folder / "summary.json", lambda aside: aside.write_text(text))

    def _write(self, step: int, values: dict[str, float | str], kind: str) -> None:
        if self._file is None:
            self._open()
        now = time()
        record = {"step": step, "stage": self._stage.name if self._stage else "", "kind": kind, "time": round(now, 3)}
        line = json.dumps(_strict(record | values), allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, str):
                self._board.add_text(f"{kind}/{name}", value, step, now)
            else:
                self._board.add_scalar(f"{kind}/{name}", value, step, walltime=now)
        self._board.flush()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: dry runs and other ranks don't

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            _keep_until(path, math.inf)
        self._file = path.open("ab")
        purge_step = None if self._resumed_at is None else self._resumed_at + 1
        self._board = SummaryWriter(self.folder / "tensorboard", purge_step=purge_step)

    def _clock(self) -> float:
        return monotonic() - self._paused

    def _rates(self, step: int) -> dict[str, float]:
        if self._clock_mark is None:
            return {}
        now, (then, marked_step) = self._clock(), self._clock_mark
        if step <= marked_step or now <= then:
            return {}
        self._clock_mark = (now, step)
        rates = {"images_per_second": (step - marked_step) * self._stage.images_per_step / (now - then)}
        if self._stage.flops_per_image and self.peak_flops:
            rates["mfu"] = rates["images_per_second"] * self._stage.flops_per_image / self.peak_flops
        return rates

    def _seconds_left(self) -> float | None:
        done = self._step - self._first_step
        left = self._stage.start_step + self._stage.total_steps - self._step
        return (monotonic() - self._first_tick) / done * left if done > 0 and left > 0 else None

    def _status(self) -> list[str]:
        words = [f"{name} {_short(self._latest[name])}" for name in ("loss", "lr") if name in self._latest]
        if "images_per_second" in self._latest:
            words.append(f"{self._latest['images_per_second']:,.0f} images/s")
        if "mfu" in self._latest:
            words.append(f"MFU {self._latest['mfu']:.1%}")
        return words

    def _progress(self) -> str:
        left = self._seconds_left()
        return f"{self._steps_done()}, {_duration(left)} left" if left is not None else self._steps_done()

    def _steps_done(self) -> str:
        return f"{self._step - self._stage.start_step:,} of {self._stage.total_steps:,} steps"

    def _display(self) -> Table:
        done = self._step - self._stage.start_step
        bar = ProgressBar(total=max(1, self._stage.total_steps), completed=done, width=24)
        top, whole = Table.grid(padding=(0, 1)), Table.grid()
        top.add_row(Text(self._stage.title, style="bold"), bar, Text(self._progress(), no_wrap=True))
        whole.add_row(top)
        whole.add_row(Text("  ·  ".join(self._status()), style="dim", no_wrap=True, overflow="ellipsis"))
        return whole

    def _print_line(self) -> None:
        now = monotonic()
        # Every 10 s while someone may be watching a run start, then once a minute: a week is 10,000 lines.
        self._next_line = now + (10 if now - self._stage_began < 300 else 60)
        self._shown_step = self._step
        self.message("  ·  ".join([f"{self._stage.title}: {self._progress()}", *self._status()]))

    def _end_stage(self) -> None:
        if self._stage is None:
            return
        if self._live is not None:
            self._live.stop()
            self._live = None
            took = _duration(monotonic() - self._stage_began)
            self.message("  ·  ".join([f"{self._stage.title}: {self._steps_done()} in {took}", *self._status()]))
        elif self._shown and self._shown_step != self._step:
            self._print_line()
        self._stage = None


def _parsed(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _keep_until(path: Path, last_step: float) -> None:
    content = path.read_bytes()
    lines = [line for line in content.splitlines() if (record := _parsed(line)) and record["step"] <= last_step]
    kept = b"".join(line + b"\n" for line in lines)
    if kept != content:
        write_file(path, lambda aside: aside.write_bytes(kept))


def _strict(values: dict) -> dict:
    """JSON has no NaN and no infinity: null stands for them, and "not_finite" tells which they were, by dotted name."""
    odd: dict[str, str] = {}

    def plain(value: object, name: str) -> object:
        if isinstance(value, Mapping):
            return {str(k): plain(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v, f"{name}.{i}") for i, v in enumerate(value)]
        if isinstance(value, bool):
            return value
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            if math.isfinite(value):
                return float(value)
            odd[name] = str(float(value))
            return None
        return value

    strict = plain(values, "")
    return strict | {"not_finite": odd} if odd else strict


def _in_words(values: Mapping[str, float | str]) -> str:
    numbers = ", ".join(f"{name} {_short(value)}" for name, value in values.items() if not isinstance(value, str))
    return "; ".join(filter(None, [numbers, *(value for value in values.values() if isinstance(value, str))]))


def _short(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1.5:
        return f"{seconds:.0f} s"
    if hours < 1.5:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"

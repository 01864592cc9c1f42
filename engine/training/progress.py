"""What a run shows while it trains: a live bar in a terminal, plain lines elsewhere, and the time that is left."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.training.waits import LOADER_BOUND


@dataclass(frozen=True)
class Stretch:
    """Where a stage lies in its run: steps count finished updates, `start_step` those of the stages before."""

    name: str
    index: int
    count: int
    start_step: int
    total_steps: int

    @property
    def title(self) -> str:
        return f"stage {self.index + 1}/{self.count} {self.name}" if self.count > 1 else self.name

    @property
    def end_step(self) -> int:
        return self.start_step + self.total_steps


class Progress:
    """The display of one run.

    Args:
        console: where to show it; a terminal gets a live bar, all else plain lines.
        shown: not `shown`, nothing is printed.

    Attributes:
        stage: what is being trained; None before, between and after.
    """

    def __init__(self, console: Console, shown: bool):
        self.stage: Stretch | None = None
        self._console, self._shown = console, shown
        self._live: Live | None = None
        self._latest: dict[str, float] = {}
        self._step, self._next_line = 0, 0.0

    def begin(self, stage: Stretch, step: int, images_per_step: int) -> None:
        """A stage begins, or goes on after `step`."""
        self.stage, self._step = stage, step
        self._latest = {}
        self._first: tuple[float, int] | None = None
        self._began = monotonic()
        self._shown_step = step
        self._next_line = self._began + 10
        first = f"step {step + 1:,} to {stage.end_step:,}, {images_per_step} images a step"
        self.message(f"{stage.title}: {first}" + (" (resumed)" if step > stage.start_step else ""))
        if self._shown and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._display, refresh_per_second=4, transient=True)
            self._live.start()

    def tick(self, step: int) -> None:
        """`step` updates are finished."""
        if self._first is None:
            self._first, self._step = (monotonic(), step), step
            return
        self._step = step
        if self._shown and self._live is None and monotonic() >= self._next_line:
            self._print_line()

    def show(self, values: Mapping[str, float]) -> None:
        """What the next lines say of the training."""
        self._next_line = self._next_line if self._latest else 0.0
        self._latest = dict(values)

    def report(self, kind: str, step: int, values: Mapping[str, float | str]) -> None:
        """Print one line of measured values."""
        self.message(f"{kind} at step {step:,}: {_in_words(values)}")

    def message(self, text: str) -> None:
        """Print one line, above the bar."""
        if self._shown:
            self._console.out(text, highlight=False)

    def end(self) -> None:
        """The stage ends, if there is one; the terminal is given back."""
        if self.stage is None:
            return
        if self._live is not None:
            self._live.stop()
            self._live = None
            took = _duration(monotonic() - self._began)
            self.message("  ·  ".join([f"{self.stage.title}: {self._steps_done()} in {took}", *self._status()]))
        elif self._shown and self._shown_step != self._step:
            self._print_line()
        self.stage = None

    def _seconds_left(self) -> float | None:
        if self._first is None:
            return None
        then, first_step = self._first
        done, left = self._step - first_step, self.stage.end_step - self._step
        return (monotonic() - then) / done * left if done > 0 and left > 0 else None

    def _status(self) -> list[str]:
        words = [f"{name} {_short(self._latest[name])}" for name in ("loss", "lr") if name in self._latest]
        if "images_per_second" in self._latest:
            words.append(f"{self._latest['images_per_second']:,.0f} images/s")
        if "mfu" in self._latest:
            words.append(f"MFU {self._latest['mfu']:.1%}")
        if self._latest.get("waiting_for_data", 0) >= LOADER_BOUND:
            words.append(f"waiting for data {self._latest['waiting_for_data']:.0%}")
        return words

    def _progress(self) -> str:
        left = self._seconds_left()
        return f"{self._steps_done()}, {_duration(left)} left" if left is not None else self._steps_done()

    def _steps_done(self) -> str:
        return f"{self._step - self.stage.start_step:,} of {self.stage.total_steps:,} steps"

    def _display(self) -> Table:
        done = self._step - self.stage.start_step
        bar = ProgressBar(total=max(1, self.stage.total_steps), completed=done, width=24)
        top, whole = Table.grid(padding=(0, 1)), Table.grid()
        top.add_row(Text(self.stage.title, style="bold"), bar, Text(self._progress(), no_wrap=True))
        whole.add_row(top)
        whole.add_row(Text("  ·  ".join(self._status()), style="dim", no_wrap=True, overflow="ellipsis"))
        return whole

    def _print_line(self) -> None:
        now = monotonic()
        # Every 10 s while someone may be watching a run start, then once a minute: a week is 10,000 lines.
        self._next_line = now + (10 if now - self._began < 300 else 60)
        self._shown_step = self._step
        self.message("  ·  ".join([f"{self.stage.title}: {self._progress()}", *self._status()]))


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

"""When a stage shows what: of each step its phase, how many images it takes and which, and where schedules stand.

All of it is a function of the step's number, so that loader, draws, schedules and bills agree on it, and a run that goes on has
nothing of it to restore.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.phases import WHOLE, Phase, Phases

CLOCKS = ("images", "compute")
BATCHES = ("same", "grow")
ALIKE = Phases()
OVER = 1.05  # so much more than a step of whole images a step of a grown batch may compute


class Place(NamedTuple):
    """Of a step.

    Attributes:
        epoch, position: its images are those of the epoch's order from this position on.
        seen: images of the stage before it.
        clock: where schedules stand, from 0 to below the timetable's length; steps made, where all are alike.
    """

    epoch: int
    position: int
    seen: int
    clock: float


@dataclass(frozen=True)
class Stretch:
    """The steps of a phase: from `first` on, `end` is the first one past it; `images` of each, over all ranks."""

    first: int
    end: int
    phase: Phase
    images: int


class _Span(NamedTuple):
    """Steps of one phase in one epoch, from `first` on."""

    first: int
    steps: int
    epoch: int
    position: int
    seen: int
    images: int


class Timetable:
    """Of the steps of a stage.

    A phase shows the same images whatever their number in a step: where phases differ in it, images that fill no step at the end
    of a phase, like those at the end of an epoch, are left out.

    Args:
        images: of the data.
        batch: images of a step over all ranks, in phases that have no number of their own.
        epochs: of the stage.
        phases: their starts are shares of the stage's clock.
        batches: by phase, where it has a number of its own; at least `batch`, at most `images`.
        costs: by phase what an image takes in it, in any unit. With them the clock shows compute: a phase's steps are as many as
            its share of the stage's compute pays for. Without, it shows images.

    Attributes:
        length: of the clock: steps of `batch` images that the epochs have.
        total_steps: of the stage.
        stretches: those of all phases that have a step, in order.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        epochs: int,
        phases: Phases = ALIKE,
        *,
        batches: Mapping[Phase, int] | None = None,
        costs: Mapping[Phase, float] | None = None,
    ):
        self.images, self.batch, self.per_epoch = images, batch, images // batch
        self.length = epochs * self.per_epoch
        if costs is not None:
            phases = _by_compute(phases, costs)
        self._spent = [(0, 0.0, 1.0)]  # first of the steps of `batch` images, compute before it, compute of each
        if costs is not None:
            self._spent, before = [], 0.0
            for first, end, phase in phases.steps(self.length):
                self._spent.append((first, before, costs[phase]))
                before += (end - first) * costs[phase]
        self._spans: list[_Span] = []
        self.stretches: list[Stretch] = []
        step = seen = 0
        for first, end, phase in phases.steps(self.length):
            size = (batches or {}).get(phase, batch)
            spans = list(self._of_phase(first, end, size, step, seen))
            if spans:
                until = spans[-1].first + spans[-1].steps
                self.stretches.append(Stretch(step, until, phase, size))
                step, seen = until, seen + (until - step) * size
                self._spans += spans
        self.total_steps = step

    def place(self, step: int) -> Place:
        """Of a step; past the last one epochs go on as the last one did."""
        span = self._spans[bisect_right(self._spans, step, key=lambda span: span.first) - 1]
        more, among = divmod(step - span.first, span.steps)
        epoch, position = span.epoch + more, span.position + among * span.images
        seen = span.seen + (step - span.first) * span.images
        return Place(epoch, position, seen, self._clock(epoch * self.per_epoch + position / self.batch))

    def stretch(self, step: int) -> Stretch:
        """The one that a step lies in."""
        return next(stretch for stretch in self.stretches if step < stretch.end)

    def ends_epochs(self, steps: int, every: int) -> bool:
        """Whether, after so many steps, at least one, a number of epochs that `every` divides has just ended."""
        return self.place(steps).epoch // every > self.place(steps - 1).epoch // every

    def _of_phase(self, first: int, end: int, size: int, step: int, seen: int) -> Iterator[_Span]:
        """Its spans, where it is to show the images of so many steps of `batch`."""
        for epoch in range(first // self.per_epoch, -(-end // self.per_epoch)):
            begun, ended = (steps - epoch * self.per_epoch for steps in (first, end))
            low = max(0, begun) * self.batch
            high = self.images if ended >= self.per_epoch else ended * self.batch
            steps = (high - low) // size
            if steps:
                yield _Span(step, steps, epoch, low, seen, size)
                step, seen = step + steps, seen + steps * size

    def _clock(self, reading: float) -> float:
        """Where schedules stand, of steps of `batch` images."""
        if len(self._spent) == 1:
            return reading
        first, before, cost = self._spent[bisect_right(self._spent, reading, key=lambda knot: knot[0]) - 1]
        last, before_last, cost_of_last = self._spent[-1]
        whole = before_last + (self.length - last) * cost_of_last
        return self.length * (before + (reading - first) * cost) / whole


def grown(batch: int, costs: Mapping[Phase, float], images: int) -> dict[Phase, int]:
    """Images of a step by phase, as many whole batches as cost about what one of whole images does, and as the data have: so who
    can share out the batch can share out these, too.

    Args:
        costs: by phase what an image takes in it.
        images: of the data.
    """
    times = {phase: int(OVER * costs[WHOLE] / cost) for phase, cost in costs.items()}
    return {phase: batch * max(1, min(many, images // batch)) for phase, many in times.items()}


def _by_compute(phases: Phases, costs: Mapping[Phase, float]) -> Phases:
    """Phases that start at shares of the images, for those that start at shares of compute."""
    widths = [end - start for start, end in zip(phases.starts, (*phases.starts[1:], 1.0), strict=True)]
    images = [width / costs[phase] for width, phase in zip(widths, phases.phases, strict=True)]
    return Phases(tuple(sum(images[:number]) / sum(images) for number in range(len(images))), phases.phases)

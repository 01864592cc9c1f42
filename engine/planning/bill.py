"""From a counted step and a card to time, energy and money; modelled, so each figure has a low and a high one beside it.

A kernel takes the longer of bytes / bandwidth and operations / rate, and each launch 3 us; a step takes at least what the host
needs to launch it all. Gradients are sent while backward goes on: what is longer than backward adds to the step, and in the worst
case all of it. Low, likely and high are what of its peaks the
card is taken to reach (`engine.planning.cards`). Time for loading data, probing, saving and judging is not in it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.planning.cards import LAUNCH, Card, Reached
from engine.planning.counting import Count
from engine.planning.peak import GROWING
from engine.planning.traffic import Moved
from engine.training.portions import Portion

# of memory: what CUDA, its libraries and NCCL take, and what the allocator cannot use of its blocks
CONTEXT, WHOLE_BLOCKS = 1.0 * 2**30, 0.03
HOST = (12e-6, 7e-6, 4e-6)  # seconds of the host for a launch, torch's own work included: assumed, worst, likely, best
# kernels as they are called elsewhere; inductor names its own after what is fused in them
SPOKEN = dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), "matrix products") | {
    "packed_attention_forward": "attention",
    "packed_attention_backward": "attention",
    "_fused_adamw_": "AdamW",
}


@dataclass(frozen=True)
class Spread:
    """A modelled figure: with what the card is taken to reach at least, likely, and at best."""

    low: float
    likely: float
    high: float

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, factor: float) -> "Spread":
        return Spread(self.low * factor, self.likely * factor, self.high * factor)

    def inverse(self, factor: float) -> "Spread":
        """factor / figure: the lowest becomes the highest."""
        return Spread(factor / self.high, factor / self.likely, factor / self.low)


def seconds(rows: Iterable[Moved], card: Card, reached: Reached) -> float:
    """What kernels take on a card that reaches these shares of its peaks."""
    bandwidth = card.bandwidth * reached.bandwidth
    rates = {
        "half": card.half * reached.products,
        "single": card.single * reached.products,
        "attention": card.half * reached.attention,
    }
    return sum(
        LAUNCH * row.launches
        + sum(calls * max(work.bytes / bandwidth, work.flops / rates[work.unit]) for work, calls in row.work.items())
        for row in rows
    )


def step_seconds(count: Count, card: Card, gpus: int) -> Spread:
    """Of a step of `gpus` cards together, each as counted; from the best case to the worst."""
    sent = 2 * (gpus - 1) / gpus * count.gradient_bytes
    worst, likely, best = card.reached
    backward = [row for row in count.rows if row.part == "backward"]

    def of(reached: Reached, host: float, hidden: bool) -> float:
        sending = sent / (card.link * reached.bandwidth)
        beside = seconds(backward, card, reached) if hidden else 0.0
        return max(host * count.launches, seconds(count.rows, card, reached) + max(0.0, sending - beside))

    return Spread(of(best, HOST[2], True), of(likely, HOST[1], True), of(worst, HOST[0], False))


def needed_memory(count: Count) -> float:
    """Bytes of a card that a step takes, with what lies about the allocator's peak."""
    return count.peak_bytes * (1 + WHOLE_BLOCKS) + CONTEXT


def fits(count: Count, card: Card) -> bool:
    return needed_memory(count) <= card.memory


def images_that_fit(count: Count, images: int, card: Card) -> int:
    """About how many images of a step a GPU has room for, where so many were counted: their part of memory grows with them."""
    grows = sum(count.peak[part] for part in GROWING) * (1 + WHOLE_BLOCKS)
    room = card.memory - (needed_memory(count) - grows)
    return max(0, int(images * room / grows))


@dataclass(frozen=True)
class StageBill:
    """One stage of a run, or one phase of it, on so many cards.

    Attributes:
        step: seconds.
        images_per_second: of all cards together.
        hours: of the stage.
        mixed: as that of a portion.
    """

    name: str
    count: Count
    batch: int
    steps: int
    step: Spread
    gpus: int
    mixed: str

    @property
    def images_per_second(self) -> Spread:
        return self.step.inverse(self.batch)

    @property
    def hours(self) -> Spread:
        return self.step * (self.steps / 3600)


def of_portion(portion: Portion, count: Count, card: Card, gpus: int) -> StageBill:
    batch = portion.images_per_step
    return StageBill(portion.name, count, batch, portion.steps, step_seconds(count, card, gpus), gpus, portion.mixed)


def images_needed(stages: Sequence[StageBill]) -> float:
    """Images a second that a loader has to give in the fastest steps, likely."""
    together: dict[str, list[StageBill]] = defaultdict(list)
    for stage in stages:
        if stage.steps:
            together[stage.mixed].append(stage)
    return max(
        sum(one.batch * one.steps for one in mixed) / (3600 * sum(one.hours.likely for one in mixed))
        for mixed in together.values()
    )


def hours(stages: Sequence[StageBill]) -> Spread:
    return sum((stage.hours for stage in stages), Spread(0.0, 0.0, 0.0))


def kilowatt_hours(stages: Sequence[StageBill], card: Card) -> Spread:
    """Of the cards at their power limit; not of the machine around them."""
    return hours(stages) * (card.watts / 1000 * stages[0].gpus)


def costliest(count: Count, card: Card, rows: int) -> list[tuple[str, float]]:
    """What takes most of a step, and its likely share of it."""
    _, likely, _ = card.reached
    taken: dict[str, float] = defaultdict(float)
    for row in count.rows:
        taken[f"{SPOKEN.get(row.name, row.name)}, {row.part}"] += seconds([row], card, likely)
    whole = sum(taken.values())
    return [(name, took / whole) for name, took in sorted(taken.items(), key=lambda pair: -pair[1])[:rows]]

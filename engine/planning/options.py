"""What could be done otherwise: the options that save time or memory, and those of them that make a run fit a card."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as numbers

from engine.planning.bill import CONTEXT, WHOLE_BLOCKS, fits, needed_memory
from engine.planning.cards import Card
from engine.planning.counting import Count
from engine.planning.peak import GROWING, PARTS
from engine.training import gradient_cache
from engine.training.config import Plan

# by how much each lowers what grows with the batch, and raises the work: first guesses, counted before they are believed
LEFT = {"none": 1.0, "selective": 0.62, "blocks": 0.2}
WORK = {"none": 0.0, "selective": 0.04, "blocks": 0.33}
TRIES = 6


@dataclass(frozen=True)
class Option:
    """Flags of `engine.train`, and what they are called."""

    name: str
    flags: tuple[str, ...]


def options(plan: Plan) -> Iterator[Option]:
    """What differs from this plan by one step."""
    train = plan.train
    if train.compile != "off":
        yield Option("not compiled", ("--compile", "off"))
    for choice in ("selective", "blocks"):
        if train.recompute == "none":
            yield Option(f"recompute {choice}", ("--recompute", choice))
    yield Option("twice the micro-batches", ("--accumulate", str(2 * train.accumulate)))
    if train.residual == "fp32" and train.precision in ("auto", "bf16"):
        yield Option("residual stream in bf16", ("--residual", "bf16"))
    for name, settings in plan.stages:
        if getattr(settings, "reuse", None) == 0 and getattr(settings, "patch_keep", 1) == 1:
            yield Option(f"{name}: features of two crops stored", (f"--{name}.reuse", "2"))
        if getattr(settings, "patch_keep", None) == 1 and not getattr(settings, "reuse", 0):
            yield Option(f"{name}: half of the patches", (f"--{name}.patch-keep", "0.5"))


@dataclass(frozen=True)
class Saving:
    """A way to less memory, and a guess at what it costs."""

    recompute: str
    accumulate: int
    work: float

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--recompute", self.recompute, "--accumulate", str(self.accumulate))


def savings(plan: Plan, counts: Sequence[Count], card: Card, gpus: int) -> list[Saving]:
    """Those that should fit, the least work first; `counts` are of the plan as it is, without any."""
    found = []
    for micro in _micro_batches(plan, gpus):
        for recompute, left in LEFT.items():
            if all(_guess(count.peak, left, micro) <= card.memory for count in counts):
                again = 0.3 * (micro > 1) * any(gradient_cache.needed(s, micro) for _, s in plan.stages)
                found.append(Saving(recompute, micro, again + WORK[recompute] + 0.01 * micro))
    return sorted(found, key=lambda saving: saving.work)[:TRIES]


def _micro_batches(plan: Plan, gpus: int) -> Iterator[int]:
    for power in numbers():
        micro = 2**power
        if any(settings.batch_size % (gpus * micro) for _, settings in plan.stages):
            return
        yield micro


def _guess(peak: Mapping[str, int], left: float, micro: int) -> float:
    """Bytes that a step might need."""
    growing = {part: peak[part] for part in GROWING} | {"activations": peak["activations"] * left}
    stands = sum(peak[part] for part in PARTS if part not in GROWING)
    return (1 + WHOLE_BLOCKS) * (stands + sum(growing.values()) / micro) + CONTEXT


def fitting(counts: Sequence[Count], card: Card) -> bool:
    return all(fits(count, card) for count in counts)


def largest_need(counts: Sequence[Count]) -> float:
    """Bytes."""
    return max(map(needed_memory, counts))

"""Phases of a stage in which a step sees fewer tokens: smaller crops, fewer small ones, larger patches, fewer of them; or fewer
branches of the encoder. Cheap phases come first, and the last one sees all, so that what is judged and exported was trained at
the size it is used at.

A phase is a function of the step alone, and what it draws for a step one of the run's seed and the step, so there is no state to
save.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from engine.core.draws import seed_of


@dataclass(frozen=True)
class Phase:
    """What the steps of a phase see of each image.

    Attributes:
        side: of all crops, as a share of their full one.
        sides: what that is multiplied with besides: each crop of each image has one of these, all equally many.
        keep: share of a large crop's patches that the trained encoder is shown; a teacher sees all.
        patch: side of a patch, as a multiple of the model's.
        draws: what that is multiplied with besides: each step draws one of these.
        small: share of the small crops that an image has.
        depth: rate of stochastic depth, as a multiple of the model's.
    """

    side: float = 1.0
    keep: float = 1.0
    patch: float = 1.0
    draws: tuple[float, ...] = (1.0,)
    small: float = 1.0
    sides: tuple[float, ...] = (1.0,)
    depth: float = 1.0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Phase":
        """Of what `asdict` made of one and JSON of that."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @cached_property
    def forms(self) -> tuple["Phase", ...]:
        """What steps of the phase see, for each number that they may draw; these draw nothing."""
        return tuple(replace(self, patch=self.patch * factor, draws=(1.0,)) for factor in self.draws)

    @cached_property
    def evenly(self) -> tuple["Phase", ...]:
        """Phases in which all crops are as large as some of this one's; on average they cost what it does."""
        return tuple(replace(self, side=self.side * side, sides=(1.0,)) for side in self.sides)

    def form(self, seed: int, stage: int, step: int) -> "Phase":
        """That of a step of the run of this seed; all ranks draw the same, and a resumed run what another would have drawn."""
        return self.forms[seed_of(seed, stage, step, "patch") % len(self.forms)]

    def patch_size(self, patch: int) -> int:
        """Side of a patch in pixels, where the model's is `patch`."""
        return round(self.patch * patch)

    def size(self, full: tuple[int, int], patch: int) -> tuple[int, int]:
        """Height and width of a crop in pixels: of whole patches, at least one, as near to the share as they can be. The model's
        patches are of `patch` pixels."""
        own = self.patch_size(patch)
        height, width = (max(1, round(self.side * side / own)) * own for side in full)
        return (height, width) if self.side < 1 or self.patch > 1 else full

    def kept(self, patches: float) -> int:
        """How many of so many patches are shown, at least one."""
        return max(1, round(self.keep * patches))

    def small_crops(self, full: int) -> int:
        """How many small crops an image has, perhaps none."""
        return round(self.small * full)


WHOLE = Phase()


@dataclass(frozen=True)
class Phases:
    """Those of a stage, in order.

    Attributes:
        starts: shares of the stage at which they begin, by its clock (`engine.core.timetable`); the first is 0.
        phases: as many; the last one is `WHOLE`.
    """

    starts: tuple[float, ...] = (0.0,)
    phases: tuple[Phase, ...] = (WHOLE,)

    @classmethod
    def of(
        cls,
        starts: Sequence[float],
        sides: Sequence[float],
        keeps: Sequence[float],
        patches: Sequence[float] = (1.0,),
        draws: tuple[float, ...] = (1.0,),
        small: Sequence[float] = (1.0,),
        of_images: tuple[float, ...] = (1.0,),
        depths: Sequence[float] = (1.0,),
    ) -> "Phases":
        """Of as many numbers each; a single one goes for all phases, and what steps or images draw for all but the last."""
        columns = (
            *(_each(values, len(starts)) for values in (sides, keeps, patches)),
            (draws,) * (len(starts) - 1) + ((1.0,),),
            _each(small, len(starts)),
            (of_images,) * (len(starts) - 1) + ((1.0,),),
            _each(depths, len(starts)),
        )
        return cls(tuple(starts), tuple(Phase(*row) for row in zip(*columns, strict=True)))

    def sizes(self, full: tuple[int, int], patch: int) -> list[tuple[int, int]]:
        """Height and width in pixels of a crop in all phases, where the model's patches are of `patch` pixels."""
        return sorted({form.size(full, patch) for phase in self.phases for form in phase.forms})

    def steps(self, total: int) -> list[tuple[int, int, Phase]]:
        """First step, end (the first step past it) and phase, of all that have a step among so many; the last always has."""
        firsts = [min(round(start * total), total - 1) for start in self.starts]
        found = zip(firsts, [*firsts[1:], total], self.phases, strict=True)
        return [(first, end, phase) for first, end, phase in found if first < end]


def _each(values: Sequence[float], count: int) -> Sequence[float]:
    return values * count if len(values) == 1 else values

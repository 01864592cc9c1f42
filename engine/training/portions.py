"""A run in portions of steps that cost alike, for those who say beforehand what it costs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from engine.core.phases import Phase
from engine.core.timetable import Stretch
from engine.training.config import Plan
from engine.training.loop import Stage

ALL: Mapping[str, Sequence[Phase]] = MappingProxyType({})


@dataclass(frozen=True)
class Portion:
    """All steps of a stage, or those of one of its phases (`engine.core.phases`), where these draw of one form. Where crops of a
    step are of several sizes, as if each step had crops of one, and equally many steps had each.

    Attributes:
        name: the stage's, with the phase's number where it has several, and with what its steps draw or its crops differ in.
        steps: how many encode images. Where features are stored, those that it takes to store them: steps on what is stored are
            nothing beside that.
        images_per_step: over all ranks.
        mixed: of portions that a step mixes the name of what they are of; else the portion's own.
    """

    name: str
    stage: Stage
    phase: Phase
    steps: int
    images_per_step: int
    mixed: str


def portions(plan: Plan, stages: Sequence[Stage], chosen: Mapping[str, Sequence[Phase]] = ALL) -> list[Portion]:
    """Of all stages, in order.

    Args:
        chosen: by stage what its first stretches show, where it chooses that as it goes; the others show all.
    """
    found = []
    for stage in stages:
        settings = plan.stages[stage.index][1]
        reuse, stretches = getattr(settings, "reuse", 0), _shown(stage.timetable.stretches, chosen.get(stage.name, ()))
        for number, one in enumerate(stretches, 1):
            name = stage.name if len(stretches) == 1 else f"{stage.name}, phase {number}"
            if len(one.phase.evenly) > 1:
                found += _by_side(name, stage, one)
                continue
            if len(one.phase.forms) == 1:
                steps = reuse * stage.timetable.per_epoch or one.end - one.first
                found.append(Portion(name, stage, one.phase, steps, one.images, name))
                continue
            drawn = Counter(one.phase.form(plan.train.seed, stage.index, step) for step in range(one.first, one.end))
            for form in one.phase.forms:
                of_form = f"{name}, patches x {form.patch:g}"
                found.append(Portion(of_form, stage, form, drawn[form], one.images, of_form))
    return found


def _by_side(name: str, stage: Stage, one: Stretch) -> Iterator[Portion]:
    """Of a stretch whose crops are of several sizes."""
    even = one.phase.evenly
    for number, phase in enumerate(even):
        steps = len(range(one.first + number, one.end, len(even)))
        yield Portion(f"{name}, sides x {phase.side:.3g}", stage, phase, steps, one.images, name)


def _shown(stretches: Sequence[Stretch], chosen: Sequence[Phase]) -> list[Stretch]:
    """Those that show alike one after another as one."""
    found: list[Stretch] = []
    for number, one in enumerate(stretches):
        one = replace(one, phase=chosen[number]) if number < len(chosen) else one
        if found and found[-1].phase == one.phase:
            one = replace(one, first=found.pop().first)
        found.append(one)
    return found

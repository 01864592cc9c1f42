"""What a run computes, in operations of matrix products: counted from its plan, without memory for weights and without a step."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from engine import methods
from engine.core.phases import WHOLE, Phase
from engine.model import vit
from engine.training import token_choice
from engine.training.calls import without_data
from engine.training.config import Plan
from engine.training.loop import Stage
from engine.training.portions import ALL, portions
from engine.training.token_choice import candidates

CLASSES = 1000


def operations(
    plan: Plan, stages: Sequence[Stage], classes: int = CLASSES, chosen: Mapping[str, Sequence[Phase]] = ALL
) -> dict[str, float]:
    """By stage, of all its steps and images: three passes where there are gradients, one where there are none, as
    `Method.flops_per_image` has it; with what it takes to store features or to choose phases, where a stage does.

    Args:
        classes: of the images, for stages that learn from them.
        chosen: as for `portions`.
    """
    found: dict[str, float] = {}
    for stage in stages:
        if phases := chosen.get(stage.name):
            looked_at = costs(plan, stage.index, [*_candidates(plan, stage), WHOLE], classes)
            images = 2 * token_choice.PAIRS * plan.stages[stage.index][1].batch_size
            found[stage.name] = len(phases) * images * sum(looked_at.values())
    for portion in portions(plan, stages, chosen):
        stage, (_, settings) = portion.stage, plan.stages[portion.stage.index]
        images = portion.steps * portion.images_per_step
        cost = images * costs(plan, stage.index, [portion.phase], classes)[portion.phase]
        if getattr(settings, "reuse", 0):
            encoder = vit.without_memory(plan.model, **plan.encoder)
            with torch.device("meta"):
                heads = methods.get(stage.name)(encoder, settings).flops_per_image()
            cost -= (images - stage.total_steps * portion.images_per_step) * heads
        found[stage.name] = found.get(stage.name, 0.0) + cost
    return found


def cheapest(plan: Plan, stages: Sequence[Stage]) -> dict[str, list[Phase]]:
    """By stage that chooses its phases as it goes, the least that it may choose."""
    found = {}
    for stage in stages:
        if plan.stages[stage.index][1].phase_choice == "auto":
            cost = costs(plan, stage.index, _candidates(plan, stage))
            found[stage.name] = [min(cost, key=cost.get)] * (len(stage.timetable.stretches) - 1)
    return found


def _candidates(plan: Plan, stage: Stage) -> tuple[Phase, ...]:
    return candidates(methods.get(stage.name), vit.without_memory(plan.model, **plan.encoder))


def costs(plan: Plan, stage: int, phases: Iterable[Phase], classes: int = CLASSES) -> dict[Phase, float]:
    """By phase what an image takes in a stage, its index; each image encoded."""
    (name, settings), found = plan.stages[stage], {}
    with torch.device("meta"):
        method = without_data(name, settings, vit.without_memory(plan.model, **plan.encoder), classes)
    for phase in phases:
        found[phase] = method.flops_in(phase)
    return found

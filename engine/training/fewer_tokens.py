"""Which stages can be shown fewer tokens, in which ways, and why others cannot."""

from collections.abc import Mapping
from typing import Any

from engine import methods
from engine.core.errors import BadInput
from engine.core.phases import Phase
from engine.methods.base import Method
from engine.methods.crops import MultiCrop
from engine.methods.settings import StageSettings
from engine.model.vit import VisionTransformer

# what a method has to be able to, for settings of a schedule
NEEDED = {"phase_keeps": "drops_patches", "aspect": "keeps_aspect"} | dict.fromkeys(
    ("phase_sides", "phase_patches", "patch_draws", "side_draws"), "shrinks"
)


def able(stage: str, settings: StageSettings, schedule: Mapping[str, Any]) -> bool:
    """Whether a stage of these settings can take a schedule's; of one that says nothing of how, whether in any way."""
    if getattr(settings, "reuse", 0):
        return False
    kind = methods.get(stage)
    wanted = [needed for setting, needed in NEEDED.items() if setting in schedule]
    return all(getattr(kind, one) for one in wanted) if wanted else any(getattr(kind, one) for one in NEEDED.values())


def obstacle(kind: type[Method], phase: Phase, encoder: VisionTransformer) -> str:
    """The setting of a phase that a method cannot show this encoder's images by, and why, in words; "" where it can."""
    relative = encoder.rel_pos_bias is not None
    if any(even.side < 1 for even in phase.evenly):
        if not kind.shrinks:
            return f"phase-sides: {kind.name} can only be trained at the model's own image size."
        if relative:
            return "phase-sides: relative positions are those of the model's own image size."
    if phase.keep < 1 and not kind.drops_patches:
        return f"phase-keeps: {kind.name} needs every patch of a crop."
    for form in phase.forms:
        if why := _of_larger_patches(kind, form, encoder) if form.patch > 1 else "":
            return f"{'phase-patches' if phase.patch > 1 else 'patch-draws'}: {why}"
    return ""


def _of_larger_patches(kind: type[Method], form: Phase, encoder: VisionTransformer) -> str:
    if not kind.shrinks:
        return f"{kind.name} can only be trained with the model's own patches."
    if encoder.rel_pos_bias is not None:
        return "relative positions are those of the model's own patches."
    own = encoder.patch_size
    side, exact = form.patch_size(own), form.patch * own
    if abs(exact - side) > 1e-6:
        return f"{form.patch:g} times the model's {own} pixels are no whole number, but {exact:g}."
    if min(form.size(encoder.img_size, own)) < 2 * side:
        return f"of patches of {side} pixels a large crop would have one row."
    return ""


def check(stage: str, settings: StageSettings, encoder: VisionTransformer) -> None:
    """Raise BadInput where a stage cannot be shown fewer tokens as its settings say. Whether phases may be chosen as the run goes
    is for `engine.training.token_choice`, which knows the candidates."""
    kind, phases = methods.get(stage), settings.token_phases.phases
    if getattr(settings, "reuse", 0) and len(phases) > 1:
        raise BadInput(f"--{stage}.phases are for steps that encode images; with --{stage}.reuse they don't.")
    for phase in phases:
        if why := obstacle(kind, phase, encoder):
            raise BadInput(f"--{stage}.{why}")
    _check_depths(stage, max(phase.depth for phase in phases), min(phase.depth for phase in phases), encoder)
    if any(phase.small < 1 for phase in phases):
        if not issubclass(kind, MultiCrop) or not settings.local_crops:
            raise BadInput(f"--{stage}.phase-locals: images of {stage} have no small crops here.")
        if min(settings.global_crops + phase.small_crops(settings.local_crops) for phase in phases) < 2:
            raise BadInput(f"--{stage}.phase-locals: there must be two crops of an image at least.")
    if any(form.patch > 1 for phase in phases for form in phase.forms):
        _check_draws(stage, settings, encoder)
    if settings.aspect == "keep" and not kind.keeps_aspect:
        raise BadInput(f"--{stage}.aspect keep: {stage} can only be trained on crops of one shape.")
    if settings.aspect == "keep" and encoder.rel_pos_bias is not None:
        raise BadInput(f"--{stage}.aspect keep: relative positions are those of the model's own grid.")


def _check_depths(stage: str, most: float, least: float, encoder: VisionTransformer) -> None:
    """Raise BadInput where the model's rates of stochastic depth can't be so many times as high."""
    highest = max(encoder.drop_path_rates)
    if not highest and (most, least) != (1, 1):
        raise BadInput(f"--{stage}.phase-depths: the model has no stochastic depth to scale.")
    if most * highest >= 1:
        raise BadInput(f"--{stage}.phase-depths: {most:g} times the model's rate of {highest:g} leaves no branch.")


def _check_draws(stage: str, settings: StageSettings, encoder: VisionTransformer) -> None:
    """Raise BadInput where crops would not stay at one size while the patches' is drawn."""
    own = encoder.patch_size
    small = (settings.local_size,) * 2 if getattr(settings, "local_crops", 0) else encoder.img_size
    for phase in settings.token_phases.phases:
        for full in (encoder.img_size, small):
            sizes = {form.size(full, own): form.patch_size(own) for form in phase.forms}
            if len(sizes) > 1:
                told = ", ".join(f"{height} x {width} in patches of {side}" for (height, width), side in sizes.items())
                raise BadInput(f"--{stage}.patch-draws: crops must stay at one size, and these would be {told} pixels.")

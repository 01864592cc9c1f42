"""The heads of MIM-Refiner alone, on a frozen encoder: its second stage."""

from dataclasses import replace

from engine.recipes import mim_refiner
from engine.recipes.base import Recipe


def _alone(whole: Recipe) -> Recipe:
    return replace(whole, stages=tuple(stage for stage in whole.stages if stage[0] == "mim_heads"))


def digits() -> Recipe:
    return _alone(mim_refiner.digits())


PUBLISHED = {"plain": lambda model: _alone(mim_refiner.published(model))}

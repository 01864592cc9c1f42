"""The contrastive head of MAE-CT alone: its second stage."""

from dataclasses import replace

from engine.recipes import maect
from engine.recipes.base import Recipe


def _alone(whole: Recipe) -> Recipe:
    return replace(whole, stages=tuple(stage for stage in whole.stages if stage[0] == "nnclr"))


def digits() -> Recipe:
    return _alone(maect.digits())


PUBLISHED = {
    "plain": lambda model: _alone(maect.published(model, aug=False)),
    "aug": lambda model: _alone(maect.published(model, aug=True)),
}

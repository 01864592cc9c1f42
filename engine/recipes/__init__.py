"""The published settings, with their sources, and the small ones for the embedded digits: one file per method.

A recipe is a list of stages. Every file has PUBLISHED, which gives the recipe of a model for each preset that was published, and
`digits`, the recipe for the embedded data.
"""

import importlib

from engine import methods
from engine.errors import BadInput
from engine.recipes.base import Recipe

__all__ = ["PRESETS", "Recipe", "recipe"]

PRESETS = ("auto", "plain", "aug", "digits")


def recipe(method: str, model: str, preset: str, embedded: bool) -> Recipe:
    """The stages of a method for a model.

    Args:
        preset: one of `PRESETS`; "auto" is "digits" for the embedded data and "plain" for others.
        embedded: whether the data are the embedded digits.

    Raises:
        BadInput: method or preset unknown.
    """
    methods.get(method)
    module = importlib.import_module(f"{__name__}.{method}")
    choices = ("auto", *module.PUBLISHED, "digits")
    if preset not in choices:
        raise BadInput(f"--preset {preset} is unknown for {method}; choose one of {', '.join(choices)}.")
    if preset == "digits" or (preset == "auto" and embedded):
        return module.digits()
    return module.PUBLISHED["plain" if preset == "auto" else preset](model.partition(".")[0])

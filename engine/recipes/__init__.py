"""The published settings, with their sources, and the small ones for the embedded digits: one file per method.

A recipe is a list of stages. Every file has PUBLISHED, which gives the recipe of a model for each preset that was published, and
`digits`, the recipe for the embedded data.
"""

import importlib
from types import ModuleType

from engine import methods
from engine.core.errors import BadInput
from engine.recipes.base import Recipe

__all__ = ["Recipe", "preset_for", "recipe"]


def preset_for(method: str, preset: str, embedded: bool, data: str = "") -> str:
    """The key of the method's PUBLISHED, or "digits", that `preset` means.

    Args:
        preset: such a key, "digits", or "auto", which is "digits" for the embedded data, the preset of the data's name where the
            method has one, and "plain" for others.
        embedded: whether the data are the embedded digits.
        data: the name of a published set (`engine.recipes.small_data`), "" for other data.

    Raises:
        BadInput: method or preset unknown.
    """
    published = _module(method).PUBLISHED
    chosen = preset
    if preset == "auto":
        chosen = "digits" if embedded else data if data in published else "plain"
    if chosen != "digits" and chosen not in published:
        meant = f" is {chosen} on these data, which" if preset == "auto" else ""
        choices = ", ".join(("auto", *published, "digits"))
        raise BadInput(f"--preset {preset}{meant} is unknown for {method}; choose one of {choices}.")
    return chosen


def recipe(method: str, model: str, preset: str, embedded: bool, data: str = "") -> Recipe:
    """The stages of a method for a model; the other arguments, and what is raised, as of `preset_for`."""
    chosen = preset_for(method, preset, embedded, data)
    if chosen == "digits":
        return _module(method).digits()
    return _module(method).PUBLISHED[chosen](model.partition(".")[0])


def _module(method: str) -> ModuleType:
    methods.get(method)
    return importlib.import_module(f"{__name__}.{method}")

"""Pretext tasks, one file each, found by name."""

import importlib
import inspect
import pkgutil

from engine.core.errors import BadInput
from engine.methods.base import Method

# what methods have in common, no methods themselves
SHARED = ("base", "clustering", "comparing", "crops", "parts", "settings", "teaching")


def names() -> list[str]:
    """Every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def get(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        BadInput: no such method.
    """
    if name not in names():
        raise BadInput(f"method {name!r} is unknown; choose one of {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    return next(member for _, member in inspect.getmembers(module, inspect.isclass) if vars(member).get("name") == name)

"""The protocols, found by the names of their files, and what each says of itself; see `engine.evals`."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from engine.core.errors import BadInput

# the package, before the function of that name takes its place in `engine.evals`
from engine.evals import protocols as _protocols

ALL = "all"


def protocols() -> tuple[str, ...]:
    """Names of all protocols, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(_protocols.__path__)))


def protocol(name: str) -> ModuleType:
    """The module of one protocol.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in protocols():
        raise BadInput(f"unknown protocol {name!r}; choose from {', '.join((*protocols(), ALL))}.")
    return importlib.import_module(f"{_protocols.__name__}.{name}")


def reads(name: str) -> str:
    """The kind of set that a protocol reads."""
    return getattr(protocol(name), "READS", "classes")


def wants(name: str, settings: Any = None) -> str:
    """What of the weights a protocol works on: "pooled" features, those and patch "tokens", or the "model".

    Args:
        settings: of the protocol, where it depends on them; None takes the defaults.
    """
    module = protocol(name)
    if hasattr(module, "wants"):
        return module.wants(settings or module.Settings())
    return getattr(module, "WANTS", "pooled")


def settings_for(names: Sequence[str], given: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """Settings by protocol: those given, or the defaults; `seed` goes into each that draws anything. "all" names every protocol.

    Raises:
        BadInput: an unknown protocol, or none at all.
    """
    if not names:
        raise BadInput(f"no protocol is named; choose from {', '.join((*protocols(), ALL))}.")
    names = protocols() if ALL in names else names
    settings = {name: (given or {}).get(name) or protocol(name).Settings() for name in names}
    return {name: seeded(chosen, seed) for name, chosen in settings.items()}


def draws(settings: Any) -> bool:
    """Whether a protocol draws anything by its seed."""
    return any(field.name == "seed" for field in fields(settings))


def seeded(settings: Any, seed: int) -> Any:
    """The settings with this seed, where the protocol draws anything."""
    return replace(settings, seed=seed) if draws(settings) else settings

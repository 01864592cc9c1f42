"""Comparisons of pretext tasks: files in this folder, found by name, each with a `STUDY`. `conduct` carries one out."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.core.errors import BadInput


@dataclass(frozen=True)
class Arm:
    """One training of a study: a pretext task, or what follows one.

    Attributes:
        name: short, for tables and folder names.
        method: what `engine.train --method` is given.
        flags: further flags of `engine.train` that make the task.
        clusters: whether it has prototypes, so that what keeps them from collapsing makes a difference.
        about: what it minimises, in words.
        after: the arm whose run of the same seed it starts from; "" starts from nothing.
        epochs: how many, as a share of its recipe's, rounded up; of an arm that has its own.
    """

    name: str
    method: str
    flags: tuple[str, ...] = ()
    clusters: bool = True
    about: str = ""
    after: str = ""
    epochs: float = 1.0


@dataclass(frozen=True)
class Study:
    """A grid of runs, as data.

    Attributes:
        name: on the command line.
        title: over tables and pictures.
        arms: the pretext tasks.
        reference: the arm whose recipe gives epochs, batch and `shared` to all; "" leaves every arm its own recipe.
        collapse: what each arm that clusters is trained with in turn; none is the recipe's own.
        fixed: settings, by field of the methods' dataclasses, that all arms are given.
        shared: further fields that all arms are given the reference's value of, because crops or masks follow from them.
        epochs: of every run on the embedded digits, where the command line says nothing; 0 is the recipe's.
        shots, percents: the low-shot subsets; those that the data are too small for are left out.
        protocols: what else encoders are judged by: knn, linear, cluster.
        classifies: whether arms have a classifier of their own, whose held-out accuracy is shown.
        costs: whether the time of training and its operations are shown.
        cadence: flags of `engine.train` on how often a run logs and saves.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    reference: str = ""
    collapse: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    epochs: int = 0
    shots: tuple[int, ...] = (1, 2, 5)
    percents: tuple[float, ...] = (1.0,)
    protocols: tuple[str, ...] = ("knn",)
    classifies: bool = False
    costs: bool = False
    cadence: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of a name.

        Raises:
            BadInput: there is none.
        """
        found = next((arm for arm in self.arms if arm.name == name), None)
        if found is None:
            raise BadInput(f"--arms has {name!r}; choose from {', '.join(arm.name for arm in self.arms)}.")
        return found


def names() -> tuple[str, ...]:
    """Every study there is."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))


def get(name: str) -> Study:
    """The study of a name.

    Raises:
        BadInput: no such study.
    """
    if name not in names():
        raise BadInput(f"study {name!r} is unknown; choose one of {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}").STUDY

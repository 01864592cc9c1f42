"""What a recipe is."""

from dataclasses import dataclass

from engine.methods.base import StageSettings


@dataclass(frozen=True)
class Recipe:
    """What a method does by default for a model.

    Attributes:
        source: where the numbers come from, in words.
        stages: (method name, settings) in order.
        encoder: overrides for `engine.vit.create`.
    """

    source: str
    stages: tuple[tuple[str, StageSettings], ...]
    encoder: dict[str, object]


DIGITS = "ours, for the embedded digits"

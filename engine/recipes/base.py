"""What a recipe is."""

from dataclasses import dataclass

from engine.methods.settings import StageSettings


@dataclass(frozen=True)
class Recipe:
    """What a method does by default for a model.

    Attributes:
        source: where the numbers come from, in words.
        stages: (method name, settings) in order.
        encoder: overrides for `engine.model.vit.create`.
    """

    source: str
    stages: tuple[tuple[str, StageSettings], ...]
    encoder: dict[str, object]


DIGITS = "ours, for the embedded digits"

# What trials on the embedded digits gave for every method with prototypes and a teacher. Untrained features lie so close that
# softer targets say the same of all images for hundreds of steps, and a slow teacher passes on little of what the student finds.
# Small crops of a digit are ambiguous: most methods do better without, at the same cost.
DIGITS_CLUSTERING = {
    "epochs": 20, "batch_size": 32, "base_lr": 8e-3, "warmup": 0.1, "weight_decay_end": 0.1, "augmentation": "minimal",
    "flip": 0.0, "crop_scale": (0.6, 1.0), "local_size": 16, "local_scale": (0.3, 0.6), "collapse": "sinkhorn", "prototypes": 64,
    "head_hidden": 256, "bottleneck": 64, "target_temperature": 0.01, "target_temperature_start": 0.01,
    "target_temperature_epochs": 0, "teacher_momentum": 0.95, "freeze_last_layer": 0,
}  # fmt: skip
DIGITS_ENCODER = {"positions": "sincos", "global_pool": "avg"}

# How encoders start and how their positions are brought to the size of small crops, by the code that it is read from. Recipes for
# the digits were found by trial with `create`'s defaults and keep them.
AS_MAE = {"initialisation": "mae"}
AS_DINO = {"initialisation": "dino", "interpolation": "offset"}

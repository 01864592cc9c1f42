"""Sizes at which any method runs in a moment, by the names of settings; a method takes those that it has."""

from dataclasses import fields
from typing import Any

from engine.methods.base import StageSettings

SIZES: dict[str, Any] = {
    "batch_size": 8,
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "projector_hidden": 32,
    "predictor_hidden": 32,
    "embedding": 16,
    "queue_size": 64,
    "top_k": 3,
    "local_crops": 2,
    "local_size": 16,
    "prototypes": 48,
    "head_hidden": 32,
    "bottleneck": 16,
    "mask_unit": 8,
    "codes": 48,
}


def small(kind: type[StageSettings], **others: Any) -> dict[str, Any]:
    """The sizes for settings of this kind, and `others` of which it has a field."""
    defaults = {field.name: field.default for field in fields(kind)}
    sizes = SIZES | ({"local_crops": 0} if defaults.get("local_crops") == 0 else {}) | others  # it may take none
    return {name: value for name, value in sizes.items() if name in defaults}

"""Sizes at which any method runs in a moment, by the names of settings; a method takes those that it has. And of every method a
form whose steps can be replayed from a CUDA graph, if it has one."""

from dataclasses import fields
from typing import Any

from engine.methods.settings import StageSettings

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
CONSTANT = {"target_temperature_start": 0.04, "target_temperature": 0.04, "target_temperature_epochs": 0}
# settings over those of `small`, for an encoder without stochastic depth
REPLAYED: dict[str, dict[str, Any]] = {
    "mae": {"crops": 2}, "simmim": {},
    "relvit": {"permute": True, "mega_patches": 2, "class_weight": 1.0, "patch_colours": "normalised"},
    "supervised": {"mixup": 0.0, "cutmix": 0.0, "erase": 0.5}, "mocov3": {}, "nnclr": {"patch_keep": 0.5},
    "maect": {"weight_ema": 0.9}, "dino": CONSTANT, "msn": CONSTANT, "swav": {"queue_size": 0}, "mim_heads": {},
    "mim_refiner": {}, "mim_cluster": CONSTANT, "mmc": CONSTANT | {"distil": "cls_to_patch"},
}  # fmt: skip


def small(kind: type[StageSettings], **others: Any) -> dict[str, Any]:
    """The sizes for settings of this kind, and `others` of which it has a field."""
    defaults = {field.name: field.default for field in fields(kind)}
    sizes = SIZES | ({"local_crops": 0} if defaults.get("local_crops") == 0 else {}) | others  # it may take none
    return {name: value for name, value in sizes.items() if name in defaults}

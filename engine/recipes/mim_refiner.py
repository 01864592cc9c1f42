"""MIM-Refiner: MAE, heads on the frozen encoder, refinement. The facts and the file of each are in mim_refiner.md.

M = facebookresearch/mae (PRETRAIN.md), R = ml-jku/MIM-Refiner (src/yamls/stage2, src/yamls/stage3).
"""

from dataclasses import dataclass, replace

from engine.methods import mim_heads
from engine.methods.mim_refiner import Settings
from engine.recipes import mae as mae_recipe
from engine.recipes.base import AS_MAE, DIGITS, Recipe


@dataclass(frozen=True)
class _Published:
    """What depends on the model's size, for MAE's weights."""

    head_blocks: tuple[int, ...]
    batch: int
    temperature: float
    epochs: int
    local_size: int
    frozen_blocks: int = 0


_SIZES = {
    "vit_large_patch16_224": _Published(tuple(range(17, 25)), 1024, 0.2, 30, 96),
    "vit_huge_patch14_224": _Published(tuple(range(21, 33)), 512, 0.3, 30, 98),
    "vit_2b_patch14_224": _Published(tuple(range(17, 25)), 512, 0.35, 20, 98, frozen_blocks=6),
}


def published(model: str) -> Recipe:
    size = _SIZES.get(model)
    source = "MIM-Refiner's published settings (R)"
    if size is None:
        source = "after MIM-Refiner's L/16 settings (R), which has no such model"
        # R's small crops are whole patches of 14 or 16 pixels.
        local_size = 98 if "patch14" in model else 96
        size = replace(_SIZES["vit_large_patch16_224"], head_blocks=(), local_size=local_size)
    shared = {
        "batch_size": size.batch,
        "temperature": size.temperature,
        "local_size": size.local_size,
        "head_blocks": size.head_blocks,
        "end_lr": 1e-6,
        "warmup_form": "between",
    }
    # R starts from M's released weights, which took twice the script's epochs.
    pretext = replace(mae_recipe.SETTINGS, epochs=1600, warmup=40 / 1600)
    heads = mim_heads.Settings(
        epochs=20, base_lr=2e-4, weight_decay=1e-5, warmup=4 / 20, top_k=1, augmentation="byol", **shared
    )
    refinement = Settings(
        epochs=size.epochs, base_lr=4e-4, head_base_lr=4e-4, weight_decay=0.05, head_weight_decay=1e-5,
        layer_decay=0.65, warmup=4 / size.epochs, top_k=20, frozen_blocks=size.frozen_blocks, weight_ema=0.9999,
        augmentation="byol", **shared,
    )  # fmt: skip
    stages = (("mae", pretext), ("mim_heads", heads), ("mim_refiner", refinement))
    encoder = AS_MAE | {"interpolation": "bicubic", "positions": "sincos", "global_pool": "token"}
    return Recipe(source, stages, encoder)


def digits() -> Recipe:
    """Ours, found by trial on the embedded digits with the small ViT."""
    shared = {
        "batch_size": 64, "augmentation": "minimal", "crop_scale": (0.4, 1.0), "flip": 0.0, "local_crops": 0, "local_size": 16,
        "projector_hidden": 256, "predictor_hidden": 512, "embedding": 64, "queue_size": 1024, "temperature": 0.2,
    }  # fmt: skip
    heads = mim_heads.Settings(epochs=4, base_lr=4e-3, **shared)
    # Half these rates gave 92.8 instead of 94.4 % k-NN in as many epochs; MAE alone has 89.2.
    refinement = Settings(epochs=16, base_lr=1.6e-2, head_base_lr=4e-3, warmup=0.2, top_k=5, weight_ema=0.99, **shared)
    stages = (("mae", mae_recipe.SMALL), ("mim_heads", heads), ("mim_refiner", refinement))
    return Recipe(DIGITS, stages, {"positions": "sincos", "global_pool": "avg"})


def thrift(model: str) -> Recipe:
    """The plain recipe, with half of the large crops' patches in stages two and three. Features of twelve crops and eight blocks
    are too many to be stored as MAE-CT's are, and there are no frozen blocks in its refinement. What it costs in quality was
    measured on the digits (docs/low_budget.md)."""
    plain = published(model)
    stages = tuple((name, s if name == "mae" else replace(s, patch_keep=0.5)) for name, s in plain.stages)
    source = f"after {plain.source.removeprefix('after ')}, with half of the large crops' patches"
    return replace(plain, source=source, stages=stages)


PUBLISHED = {"plain": published, "thrift": thrift}

"""MAE-CT: MAE, a contrastive head on the frozen encoder, contrastive tuning.

M = facebookresearch/mae (PRETRAIN.md, main_pretrain.py), C = ml-jku/MAE-CT (yamls/stage1_mae, stage2_*, stage3_*). In C both
views count in the learning rate's scaling rule.
"""

from dataclasses import dataclass, replace
from functools import partial

from engine.methods import mae, nnclr
from engine.methods.maect import Settings
from engine.recipes import mae as mae_recipe
from engine.recipes.base import AS_MAE, DIGITS, Recipe


@dataclass(frozen=True)
class _Published:
    """The rows of MAE-CT's tables that depend on the model's size; plain and aug variants as pairs."""

    pool: str
    batch: int
    tuning_epochs: tuple[int, int]
    temperature: tuple[float, float]
    top_k: tuple[int, int]
    projector_ema: float
    frozen_blocks: int


_SIZES = {
    "vit_base_patch16_224": _Published("avg", 1024, (20, 80), (0.15, 0.15), (20, 10), 0.99, 6),
    "vit_large_patch16_224": _Published("token", 1024, (20, 40), (0.2, 0.15), (20, 10), 0.99, 12),
    "vit_huge_patch16_224": _Published("token", 512, (30, 40), (0.3, 0.35), (20, 20), 0.995, 16),
    "vit_huge_patch14_224": _Published("token", 512, (30, 40), (0.3, 0.35), (20, 20), 0.995, 16),
}


def published(model: str, aug: bool) -> Recipe:
    size, variant = _SIZES.get(model), int(aug)
    known = size is not None
    size = size or replace(_SIZES["vit_base_patch16_224"], frozen_blocks=-1)
    augmentation = "byol" if aug else "minimal"
    pretext = mae.Settings(epochs=800, batch_size=size.batch, warmup=20 / 800, warmup_form="between", crops=2)
    if model == "vit_huge_patch14_224":
        # C starts this size from M's weights, which took twice the script's epochs.
        pretext = replace(mae_recipe.SETTINGS, epochs=1600, warmup=40 / 1600)
    head = nnclr.Settings(batch_size=size.batch, warmup_form="between", augmentation=augmentation)
    tuning = Settings(
        epochs=size.tuning_epochs[variant],
        batch_size=size.batch,
        warmup_form="between",
        augmentation=augmentation,
        base_lr=1e-4,
        head_base_lr=5e-4 if aug else 1e-4,
        temperature=size.temperature[variant],
        top_k=size.top_k[variant],
        projector_ema=size.projector_ema,
        frozen_blocks=size.frozen_blocks,
    )
    name = "MAE-CT aug" if aug else "MAE-CT"
    source = (
        f"{name}'s published settings (C)" if known else f"after {name}'s B/16 settings (C), which has no such model"
    )
    stages = (("mae", pretext), ("nnclr", head), ("maect", tuning))
    return Recipe(source, stages, AS_MAE | {"positions": "sincos", "global_pool": size.pool})


def digits() -> Recipe:
    """Ours, found by trial on the embedded digits with the small ViT."""
    contrastive = {
        "batch_size": 64, "augmentation": "minimal", "crop_scale": (0.4, 1.0), "flip": 0.0,
        "projector_hidden": 256, "predictor_hidden": 512, "embedding": 64, "queue_size": 1024,
    }  # fmt: skip
    head = nnclr.Settings(epochs=4, base_lr=1e-3, **contrastive)
    tuning = Settings(
        epochs=22, base_lr=4e-3, head_base_lr=1e-3, top_k=5, projector_ema=0.99, weight_ema=0.99, **contrastive
    )
    stages = (("mae", mae_recipe.SMALL), ("nnclr", head), ("maect", tuning))
    return Recipe(DIGITS, stages, {"positions": "sincos", "global_pool": "avg"})


def thrift(model: str) -> Recipe:
    """The plain recipe with what makes stages two and three cheaper: features of one pair of crops stored, then half of the
    patches and frozen blocks in bf16. What each costs in quality was measured on the digits (docs/results.md)."""
    plain = published(model, aug=False)
    cheaper = {"nnclr": {"reuse": 1}, "maect": {"patch_keep": 0.5, "frozen_precision": "bf16"}}
    stages = tuple((name, replace(settings, **cheaper.get(name, {}))) for name, settings in plain.stages)
    source = f"after {plain.source.removeprefix('after ')}, with stages two and three made cheaper"
    return replace(plain, source=source, stages=stages)


PUBLISHED = {"plain": partial(published, aug=False), "aug": partial(published, aug=True), "thrift": thrift}

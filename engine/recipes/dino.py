"""DINO. D = facebookresearch/dino 7c446df (main_dino.py's defaults, README.md's training commands); arXiv 2104.14294."""

from dataclasses import replace

from engine.methods.dino import Settings
from engine.recipes.base import AS_DINO, DIGITS, DIGITS_CLUSTERING, DIGITS_ENCODER, Recipe

# D gives 64 images per GPU; 16 GPUs are our choice.
_DEFAULTS = Settings(
    epochs=100, batch_size=1024, base_lr=5e-4, end_lr=1e-6, warmup=10 / 100, warmup_form="through", weight_decay=0.04,
    weight_decay_end=0.4, clip_norm=3.0, clip_over="tensor", collapse="centring", centre_momentum=0.9, global_crops=2,
    crop_scale=(0.4, 1.0), local_crops=8, local_size=96, local_scale=(0.05, 0.4), prototypes=65536, head_hidden=2048,
    head_layers=3, bottleneck=256, student_temperature=0.1, target_temperature=0.04, target_temperature_start=0.04,
    target_temperature_epochs=0, teacher_momentum=0.996, teacher_momentum_end=1.0, freeze_last_layer=1,
)  # fmt: skip


def published(model: str) -> Recipe:
    encoder = AS_DINO | {"global_pool": "token", "drop_path": 0.1}
    if model == "vit_small_patch16_224":
        warmer = {"target_temperature": 0.07, "target_temperature_epochs": 30}
        small = replace(_DEFAULTS, epochs=300, warmup=10 / 300, free_norm=True, **warmer)
        return Recipe("DINO's 300-epoch ViT-S recipe (D) on 16 x 64 images", (("dino", small),), encoder)
    if model == "vit_base_patch16_224":
        return Recipe("DINO's released command for ViT-B (D) on 16 x 64 images", (("dino", _DEFAULTS),), encoder)
    return Recipe("after DINO's released defaults (D) on 16 x 64 images", (("dino", _DEFAULTS),), encoder)


def digits() -> Recipe:
    """Ours, for the embedded digits and the small ViT."""
    settings = Settings(**(DIGITS_CLUSTERING | {"epochs": 25}), local_crops=0)
    return Recipe(DIGITS, (("dino", settings),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

"""MoCo v3. O = facebookresearch/moco-v3 c349e6e (its ViT commands); arXiv 2104.02057.

Not in our notes of it and so ours: AdamW's betas (torch's defaults).
"""

from engine.methods.mocov3 import Settings
from engine.recipes.base import DIGITS, DIGITS_ENCODER, Recipe

SETTINGS = Settings(
    epochs=300, batch_size=4096, base_lr=1.5e-4, weight_decay=0.1, warmup=40 / 300, crop_scale=(0.08, 1.0), resize="bilinear",
    augmentation="byol", projector_hidden=4096, predictor_hidden=4096, embedding=256, temperature=0.2, teacher_momentum=0.99,
    teacher_momentum_end=1.0, freeze_patch_embed=True,
)  # fmt: skip
ENCODER = {"initialisation": "mocov3", "positions": "sincos", "global_pool": "token"}
SMALL = Settings(
    epochs=20, batch_size=64, base_lr=4e-3, weight_decay=0.05, warmup=0.1, crop_scale=(0.6, 1.0), flip=0.0,
    augmentation="minimal", projector_hidden=256, predictor_hidden=256, embedding=64, teacher_momentum=0.95,
)  # fmt: skip
"""Ours, for the embedded digits and the small ViT."""


def published(model: str) -> Recipe:
    known = "MoCo v3's released ViT recipe (O)"
    if model == "vit_small_patch16_224":
        known = f"after {known}, whose ViT-S has 12 heads and not 6 (vit_small_12heads_patch16_224)"
    elif model not in ("vit_base_patch16_224", "vit_small_12heads_patch16_224"):
        known = f"after {known} for ViT-S and ViT-B"
    return Recipe(known, (("mocov3", SETTINGS),), ENCODER)


def digits() -> Recipe:
    return Recipe(DIGITS, (("mocov3", SMALL),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

"""SimMIM. S = microsoft/SimMIM (its 800-epoch ViT-B configuration and mask generator); arXiv 2111.09886.

Not in our notes of it and so ours: AdamW's betas (torch's defaults). S has relative position bias; here positions are fixed.
"""

from dataclasses import replace

from engine.methods.simmim import Settings
from engine.recipes.base import DIGITS, DIGITS_ENCODER, Recipe

# S counts 1e-4 per 512 images, and base_lr is per 256.
SETTINGS = Settings(
    epochs=800, batch_size=2048, base_lr=1e-4 * 256 / 512, weight_decay=0.05, warmup=10 / 800, schedule="steps",
    drops=(700 / 800,), clip_norm=5.0, crop_scale=(0.67, 1.0), mask_unit=32, mask_ratio=0.6,
)  # fmt: skip
SMALL = Settings(
    epochs=30, batch_size=32, base_lr=2e-3, warmup=0.1, schedule="cosine", drops=(), crop_scale=(0.6, 1.0), flip=0.0, mask_unit=8,
    mask_ratio=0.5,
)  # fmt: skip
"""Ours, found by trial on the embedded digits with the small ViT."""


def published(model: str) -> Recipe:
    # One square of 32 pixels would be the whole of a 32-pixel image.
    settings = replace(SETTINGS, mask_unit=8) if model.endswith("_32") else SETTINGS
    encoder = {"positions": "sincos", "global_pool": "avg", "drop_path": 0.1}
    said = "after SimMIM's released ViT-B recipe (S), whose ViT has relative position bias"
    return Recipe(said, (("simmim", settings),), encoder)


def digits() -> Recipe:
    return Recipe(DIGITS, (("simmim", SMALL),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

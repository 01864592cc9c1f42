"""SimMIM. S = microsoft/SimMIM (its 800-epoch ViT-B configuration and mask generator); arXiv 2111.09886.

Its learning rate is set after an update, so that the schedule lags one step behind.
"""

from dataclasses import replace

from engine.methods.simmim import Settings
from engine.recipes.base import DIGITS, DIGITS_ENCODER, Recipe

# S counts 1e-4 per 512 images, and base_lr is per 256; its warm-up starts from 5e-7 per 512.
SETTINGS = Settings(
    epochs=800, batch_size=2048, base_lr=1e-4 * 256 / 512, start_lr=5e-7 * 2048 / 512, warmup=10 / 800, warmup_form="late",
    schedule="steps", drops=(700 / 800,), weight_decay=0.05, clip_norm=5.0, crop_scale=(0.67, 1.0), resize="bilinear",
    decay_token=False, mask_unit=32, mask_ratio=0.6,
)  # fmt: skip
SMALL = Settings(
    epochs=30, batch_size=32, base_lr=2e-3, warmup=0.1, schedule="cosine", drops=(), crop_scale=(0.6, 1.0), flip=0.0, mask_unit=8,
    mask_ratio=0.5,
)  # fmt: skip
"""Ours, found by trial on the embedded digits with the small ViT."""


def published(model: str) -> Recipe:
    # One square of 32 pixels would be the whole of a 32-pixel image.
    settings = replace(SETTINGS, mask_unit=8) if model.endswith("_32") else SETTINGS
    encoder = {
        "initialisation": "beit",
        "positions": "relative",
        "init_values": 0.1,
        "global_pool": "avg",
        "drop_path": 0.1,
    }
    known = "SimMIM's released ViT-B recipe (S) on 2048 images"
    said = known if model == "vit_base_patch16_224" else f"after {known}, which is for another model"
    return Recipe(said, (("simmim", settings),), encoder)


def digits() -> Recipe:
    return Recipe(DIGITS, (("simmim", SMALL),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

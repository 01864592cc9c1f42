"""MMC-style. S = Sara-Ahmed/SiT 7f22e9c (main.py's defaults, README.md), arXiv 2104.03602: of MMC's authors; I = bytedance/ibot
da316d8 (README.md's training command for ViT-S/16), arXiv 2111.07832. MMC's own numbers (arXiv 2308.11448) were not found.
"""

from dataclasses import replace

from engine.methods.mmc import Settings
from engine.recipes.base import AS_DINO, DIGITS, DIGITS_CLUSTERING, DIGITS_ENCODER, Recipe

# Contrast, pixels, corruption and optimisation are S's on its 4 x 64 images; the head of prototypes and its temperatures are I's.
# All three weights are 1: S's are, and the third is our choice.
_SMALL = Settings(
    epochs=800, batch_size=256, base_lr=5e-4, end_lr=1e-6, warmup=10 / 800, warmup_form="through", weight_decay=0.04,
    weight_decay_end=0.1, clip_norm=3.0, clip_over="tensor", global_crops=2, local_crops=0, crop_scale=(0.2, 1.0), flip=0.5,
    augmentation="byol", drop=(0.5, 0.5), fill="zeros", alien=0.3, alien_probability=0.5, largest_block=0.3, block_align=1,
    contrast_weight=1.0, pixel_weight=1.0, distil_weight=1.0, distil="patch_same", projector_hidden=4096, embedding=256,
    contrast_temperature=0.2, decoder_layers=3, collapse="centring", centre_momentum=0.9, prototypes=8192, head_hidden=2048,
    head_layers=3, bottleneck=256, free_norm=True, student_temperature=0.1, target_temperature=0.07,
    target_temperature_start=0.04, target_temperature_epochs=30, freeze_last_layer=1, teacher_momentum=0.996,
    teacher_momentum_end=1.0,
)  # fmt: skip


def published(model: str) -> Recipe:
    source = "after SiT (S; of the same group) and iBOT's patches (I), as MMC's own numbers were not found"
    encoder = AS_DINO | {"global_pool": "token", "drop_path": 0.1}
    # DINO's advice, which I follows for ViT-S: the norms of prototypes learn there, in larger models not
    settings = _SMALL if model == "vit_small_patch16_224" else replace(_SMALL, free_norm=False)
    return Recipe(source, (("mmc", settings),), encoder)


def digits() -> Recipe:
    """Ours, for the embedded digits and the small ViT."""
    settings = Settings(**DIGITS_CLUSTERING, projector_hidden=256, embedding=64, block_align=8, largest_block=0.5)
    return Recipe(DIGITS, (("mmc", settings),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

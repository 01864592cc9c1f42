"""Masked images and clustering. S = Sara-Ahmed/MCSSL (main_MCSSL.py, losses.py, datasets_utils.py, README.md); arXiv 2111.15340.

The paper is arXiv 2406.17460, whose own settings were not found; S is the nearest recipe of the same group.
"""

from engine.methods.mim_cluster import Settings
from engine.recipes.base import AS_DINO, DIGITS, DIGITS_CLUSTERING, DIGITS_ENCODER, Recipe

# S gives 64 images per GPU on 8 GPUs.
SETTINGS = Settings(
    epochs=800, batch_size=512, base_lr=5e-4, end_lr=1e-6, warmup=10 / 800, warmup_form="through", weight_decay=0.04,
    weight_decay_end=0.4, clip_norm=3.0, clip_over="tensor", collapse="centring", centre_momentum=0.9, global_crops=2,
    crop_scale=(0.25, 1.0), local_crops=10, local_size=96, local_scale=(0.05, 0.25), prototypes=8192, patch_prototypes=8192,
    head_hidden=2048, head_layers=3, bottleneck=256, free_norm=False, student_temperature=0.1, target_temperature=0.07,
    target_temperature_start=0.04, target_temperature_epochs=30, teacher_momentum=0.996, teacher_momentum_end=1.0,
    freeze_last_layer=1, drop=(0.5, 0.5), fill="zeros", alien=0.3, alien_probability=0.5, largest_block=0.3, block_align=1,
    decoder_layers=2, class_weight=1.0, patch_weight=1.0, pixel_weight=1.0,
)  # fmt: skip


def published(model: str) -> Recipe:
    source = "after MC-SSL's released recipe (S) on 8 x 64 images, as the paper's own settings were not found"
    encoder = AS_DINO | {"global_pool": "token", "drop_path": 0.1}
    return Recipe(source, (("mim_cluster", SETTINGS),), encoder)


def digits() -> Recipe:
    """Ours, for the embedded digits and the small ViT."""
    settings = Settings(**DIGITS_CLUSTERING, local_crops=0, patch_prototypes=64, block_align=4)
    return Recipe(DIGITS, (("mim_cluster", settings),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

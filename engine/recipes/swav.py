"""SwAV. S = facebookresearch/swav 06b1b7c (main_swav.py, scripts/swav_800ep_pretrain.sh); arXiv 2006.09882."""

from engine.methods.swav import Settings
from engine.recipes.base import DIGITS, DIGITS_ENCODER, Recipe

# S has lr 4.8 for its batch of 4096; for a batch of 256, lr 0.6 and a queue of 3,840 images from epoch 15.
_RESNET = Settings(
    epochs=800, batch_size=4096, optimizer="larc", base_lr=0.3, start_lr=0.3, end_lr=0.0048, warmup=10 / 800,
    warmup_form="through", weight_decay=1e-6, decay_all=True,
    collapse="sinkhorn", global_crops=2, crop_scale=(0.14, 1.0), resize="bilinear",
    augmentation="swav", local_crops=6, local_size=96, local_scale=(0.05, 0.14),
    prototypes=3000, projector_hidden=2048, embedding=128, student_temperature=0.1, target_temperature=0.05,
    target_temperature_start=0.05, freeze_last_layer=1,
)  # fmt: skip


def published(model: str) -> Recipe:
    source = "after SwAV's ResNet-50 settings (S), which has no ViT"
    return Recipe(source, (("swav", _RESNET),), {"global_pool": "token"})


def digits() -> Recipe:
    """Ours, for the embedded digits and the small ViT, found by trial: sharp targets, as those with a teacher have."""
    settings = Settings(
        epochs=25, batch_size=32, optimizer="adamw", base_lr=8e-3, start_lr=0.0, end_lr=0.0, warmup=0.1, weight_decay=0.05,
        weight_decay_end=0.1, weight_ema=0.95, augmentation="minimal", flip=0.0, crop_scale=(0.6, 1.0), local_crops=0,
        prototypes=64, projector_hidden=256, embedding=64, student_temperature=0.05, target_temperature=0.01,
        target_temperature_start=0.01, freeze_last_layer=0,
    )  # fmt: skip
    return Recipe(DIGITS, (("swav", settings),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

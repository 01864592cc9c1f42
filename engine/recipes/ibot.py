"""iBOT. I = bytedance/ibot da316d8 (README.md's training command for ViT-S/16); arXiv 2111.07832."""

from dataclasses import replace

from engine.methods.ibot import Settings
from engine.recipes.base import AS_DINO, DIGITS, DIGITS_CLUSTERING, DIGITS_ENCODER, Recipe

# I trains on 16 x 64 images. Whether the prototypes' norms learn is DINO's advice: for ViT-S they do, for larger models not.
_SMALL = Settings(
    epochs=800, batch_size=1024, base_lr=5e-4, end_lr=1e-6, warmup=10 / 800, warmup_form="through", weight_decay=0.04,
    weight_decay_end=0.4, clip_norm=3.0, clip_over="tensor", collapse="centring", centre_momentum=0.9, global_crops=2,
    crop_scale=(0.25, 1.0), local_crops=10, local_size=96, local_scale=(0.05, 0.25), prototypes=8192, patch_prototypes=0,
    head_hidden=2048, head_layers=3, bottleneck=256, free_norm=True, student_temperature=0.1, target_temperature=0.07,
    target_temperature_start=0.04, target_temperature_epochs=30, teacher_momentum=0.996, teacher_momentum_end=1.0,
    freeze_last_layer=1, masking="blocks", masked_crops=0.5, mask_ratio=(0.1, 0.5), class_weight=1.0, patch_weight=1.0,
)  # fmt: skip


def published(model: str) -> Recipe:
    encoder = AS_DINO | {"global_pool": "token", "drop_path": 0.1}
    if model == "vit_small_patch16_224":
        return Recipe("iBOT's README recipe for ViT-S/16 (I), blocks masked", (("ibot", _SMALL),), encoder)
    source = "after iBOT's README recipe for ViT-S/16 (I), with norms of prototypes as DINO advises for larger models"
    return Recipe(source, (("ibot", replace(_SMALL, free_norm=False)),), encoder)


def digits() -> Recipe:
    """Ours, for the embedded digits and the small ViT."""
    return Recipe(DIGITS, (("ibot", Settings(**DIGITS_CLUSTERING, local_crops=0)),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

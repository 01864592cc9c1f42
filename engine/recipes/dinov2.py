"""DINOv2. D = facebookresearch/dinov2 b8931f7 (default configuration, ViT-L/14 configuration); arXiv 2304.07193."""

from dataclasses import replace

from engine.methods.dinov2 import Settings
from engine.recipes.base import AS_DINO, DIGITS, DIGITS_CLUSTERING, DIGITS_ENCODER, Recipe

# D's epochs are 1,250 steps whatever the data, with 64 images per GPU; 16 GPUs are our choice, and make that ImageNet once.
_DEFAULTS = Settings(
    epochs=100, batch_size=1024, base_lr=4e-3, end_lr=1e-6, warmup=10 / 100, warmup_form="through", weight_decay=0.04,
    weight_decay_end=0.4, betas=(0.9, 0.999), clip_norm=3.0, clip_over="part", collapse="centring", centre_momentum=0.9,
    global_crops=2, crop_scale=(0.32, 1.0), local_crops=8, local_size=96, local_scale=(0.05, 0.32), prototypes=65536,
    patch_prototypes=0, head_hidden=2048, head_layers=3, bottleneck=256, free_norm=True, student_temperature=0.1,
    target_temperature=0.07, target_temperature_start=0.04, target_temperature_epochs=30, teacher_momentum=0.992,
    teacher_momentum_end=1.0, freeze_last_layer=1, frozen_moments=True, augmentation="dinov2", masking="blocks", masked_crops=0.5,
    mask_ratio=(0.1, 0.5), smallest_block=4, class_weight=1.0, patch_weight=1.0, koleo_weight=0.1, layer_decay=0.9,
    patch_embed_lr=0.2,
)  # fmt: skip
# 32 images per GPU; 32 GPUs are our choice.
_LARGE14 = replace(
    _DEFAULTS, epochs=500, base_lr=2e-4, warmup=80 / 500, weight_decay_end=0.2, collapse="sinkhorn", prototypes=131072,
    bottleneck=384, patch_prototypes=131072, patch_bottleneck=256, local_size=98, teacher_momentum=0.994, layer_decay=1.0,
)  # fmt: skip


def published(model: str) -> Recipe:
    encoder = AS_DINO | {
        "initialisation": "dinov2", "global_pool": "token", "init_values": 1e-5, "drop_path": 0.3, "drop_path_uniform": True,
    }  # fmt: skip
    if model == "vit_large_patch14_224":
        source = "DINOv2's ViT-L/14 configuration (D) on 32 x 32 images"
        return Recipe(source, (("dinov2", _LARGE14),), encoder | {"drop_path": 0.4, "gated_mlp": True})
    settings = replace(_DEFAULTS, local_size=98) if "patch14" in model else _DEFAULTS
    source = "DINOv2's default configuration (D), a ViT-L/16, on 16 x 64 images"
    known = source if model == "vit_large_patch16_224" else f"after {source}"
    return Recipe(known, (("dinov2", settings),), encoder)


def digits() -> Recipe:
    """Ours, for the embedded digits and the small ViT."""
    settings = Settings(
        **DIGITS_CLUSTERING, local_crops=2, smallest_block=1, layer_decay=1.0, patch_embed_lr=1.0, koleo_weight=0.1
    )
    return Recipe(DIGITS, (("dinov2", settings),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

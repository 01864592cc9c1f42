"""MSN. M = facebookresearch/msn 4388dc1 (configs/pretrain/msn_vits16.yaml, src/msn_train.py, README.md); arXiv 2204.07141.

M trains in fp32 on all devices. For ViT-B/4 a maintainer gave other numbers (M's issue 5), on 384 x 3 images: --patch-size 4
--epochs 400 --batch-size 1152 --msn.base-lr 2.222e-4 --msn.warmup 0.0375 --msn.patch-drop 0.7.
"""

from dataclasses import replace

from engine.methods.msn import Settings
from engine.recipes.base import DIGITS, DIGITS_CLUSTERING, DIGITS_ENCODER, Recipe

# M's learning rate 1e-3 is for 16 x 64 images, whatever the batch; here it is scaled from 256.
_SMALL = Settings(
    epochs=800, batch_size=1024, base_lr=2.5e-4, start_lr=2e-4, end_lr=1e-6, warmup=15 / 800, warmup_form="to-peak", horizon=1.25,
    weight_decay=0.04, weight_decay_end=0.4, betas=(0.9, 0.999), clip_norm=3.0, clip_over="all", collapse="me-max+sinkhorn",
    me_max_weight=1.0, global_crops=2, crop_scale=(0.3, 1.0), local_crops=10, local_size=96, local_scale=(0.05, 0.3),
    augmentation="simclr", resize="bilinear", patch_drop=0.15, prototypes=1024, head_hidden=2048, head_layers=3, bottleneck=256,
    student_temperature=0.1, target_temperature=0.025, target_temperature_start=0.025, teacher_momentum=0.996,
    teacher_momentum_end=1.0, freeze_last_layer=0,
)  # fmt: skip
# M's README gives 600 epochs for these; their configurations, the share of dropped patches above all, are not published.
_LONG_ENOUGH = replace(_SMALL, epochs=600, warmup=15 / 600)
_LARGER = ("vit_base_patch16_224", "vit_large_patch16_224")


def published(model: str) -> Recipe:
    encoder = {"initialisation": "msn", "interpolation": "bicubic", "global_pool": "token"}
    if model == "vit_small_patch16_224":
        return Recipe("MSN's released recipe for ViT-S/16 (M) on 16 x 64 images", (("msn", _SMALL),), encoder)
    if model in _LARGER:
        source = "after MSN's released recipe for ViT-S/16 (M), with the released weights' 600 epochs"
        return Recipe(source, (("msn", _LONG_ENOUGH),), encoder)
    return Recipe(
        "after MSN's released recipe for ViT-S/16 (M), which is for another model", (("msn", _SMALL),), encoder
    )


def digits() -> Recipe:
    """Ours, for the embedded digits and the small ViT."""
    settings = Settings(**(DIGITS_CLUSTERING | {"collapse": "me-max+sinkhorn", "start_lr": 0.0, "local_crops": 2}))
    return Recipe(DIGITS, (("msn", settings),), DIGITS_ENCODER)


PUBLISHED = {"plain": published}

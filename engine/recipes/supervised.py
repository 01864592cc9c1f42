"""Classification. T9, T11 = tables 9 and 11 of MAE (arXiv 2111.06377); M = facebookresearch/mae (FINETUNE.md); C = RelViT's
supervised baseline (guglielmocamporese/relvit).

Ours where they say nothing in our notes: crops of 8 % and more of the image (torchvision's and timm's default); for training from
scratch, T9's augmentation and stochastic depth; for C's baseline AdamW's betas (torch's defaults) and the classifier's first
weights. C normalises by each set's own mean and standard deviation, this project by ImageNet's.
"""

from dataclasses import replace

from engine.methods.supervised import Settings
from engine.recipes.base import AS_DINO, DIGITS, DIGITS_ENCODER, Recipe
from engine.recipes.small_data import SETS

# Of M, for weights trained on normalised pixels: base lr, layer decay, epochs, stochastic depth.
FINE_TUNED = {"base": (5e-4, 0.65, 100, 0.1), "large": (1e-3, 0.75, 50, 0.2), "huge": (1e-3, 0.75, 50, 0.3)}
# Of T11: epochs; and of T9: stochastic depth.
FROM_SCRATCH = {"base": (300, 0.1), "large": (200, 0.1), "huge": (200, 0.2)}
POOLED = {"positions": "learned", "global_pool": "avg", "fc_norm": True}
BASELINE = Settings(
    epochs=100, batch_size=256, resize="bilinear", base_lr=5e-4, end_lr=1.25e-6, schedule="quarter-cosine", warmup=0.1,
    weight_decay=0.1, decay_all=True, betas=(0.9, 0.999), clip_norm=1.0, weight_ema=0.0, label_smoothing=0.0, mixup=0.0,
    cutmix=0.0, operations=0, head_std=0.02,
)  # fmt: skip
"""C: learning rate 5e-4 at its batch of 256, whatever the batch."""
SMALL = Settings(
    epochs=12, batch_size=32, base_lr=8e-3, weight_decay=0.05, warmup=0.1, weight_ema=0.0, crop_scale=(0.6, 1.0), flip=0.0,
    operations=0, mixup=0.0, cutmix=0.0,
)  # fmt: skip
"""Ours, found by trial on the embedded digits with the small ViT."""


def _size(model: str) -> str:
    """Which of ViT-B, L and H the model is; for others B's numbers are taken."""
    return next((size for size in FINE_TUNED if model.startswith(f"vit_{size}_patch1")), "")


def from_scratch(model: str) -> Recipe:
    epochs, drop_path = FROM_SCRATCH[_size(model) or "base"]
    settings = Settings(epochs=epochs, warmup=20 / epochs)
    said = "after MAE's supervised training from scratch (T11), augmented as for fine-tuning"
    return Recipe(said, (("supervised", settings),), POOLED | {"drop_path": drop_path})


def fine_tuned(model: str) -> Recipe:
    base_lr, layer_decay, epochs, drop_path = FINE_TUNED[_size(model) or "base"]
    settings = Settings(
        epochs=epochs, batch_size=1024, base_lr=base_lr, end_lr=1e-6, layer_decay=layer_decay, warmup=5 / epochs,
        weight_decay=0.05, betas=(0.9, 0.999), weight_ema=0.0, erase=0.25,
    )  # fmt: skip
    said = "after MAE's released fine-tuning (T9, M); RandAugment turns, shears and shifts bilinearly"
    said += "" if _size(model) else "; the numbers are ViT-B's"
    return Recipe(said, (("supervised", settings),), POOLED | {"drop_path": drop_path})


def _baseline(name: str) -> Recipe:
    chosen = SETS[name]
    settings = replace(BASELINE, batch_size=chosen.batch_size, pad=4 if chosen.crop == "pad" else 0)
    encoder = AS_DINO | {"positions": "learned", "global_pool": "token", "drop_path": 0.1}
    said = f"after RelViT's supervised baseline on {name} (C); images normalised as ImageNet's"
    return Recipe(said, (("supervised", settings),), encoder)


def digits() -> Recipe:
    return Recipe(DIGITS, (("supervised", SMALL),), DIGITS_ENCODER)


PUBLISHED = {"plain": from_scratch, "finetune": fine_tuned} | {
    name: lambda model, name=name: _baseline(name) for name in SETS
}

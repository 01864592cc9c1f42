"""The published settings, with their sources, and the small one for the embedded digits.

A recipe is a list of stages. Sources: M = facebookresearch/mae (PRETRAIN.md, main_pretrain.py), C = ml-jku/MAE-CT
(yamls/stage1_mae, stage2_*, stage3_*). In C both views count in the learning rate's scaling rule.
"""

from dataclasses import dataclass, replace

from engine import methods
from engine.errors import BadInput
from engine.methods.base import StageSettings

PRESETS = ("auto", "plain", "aug", "digits")


@dataclass(frozen=True)
class Recipe:
    """What a method does by default for a model.

    Attributes:
        source: where the numbers come from, in words.
        stages: (method name, settings) in order.
        encoder: overrides for `engine.vit.create`.
    """

    source: str
    stages: tuple[tuple[str, StageSettings], ...]
    encoder: dict[str, object]


@dataclass(frozen=True)
class _Published:
    """The rows of MAE-CT's tables that depend on the model's size; plain and aug variants as pairs."""

    pool: str
    batch: int
    tuning_epochs: tuple[int, int]
    temperature: tuple[float, float]
    top_k: tuple[int, int]
    projector_ema: float
    frozen_blocks: int


_SIZES = {
    "vit_base_patch16_224": _Published("avg", 1024, (20, 80), (0.15, 0.15), (20, 10), 0.99, 6),
    "vit_large_patch16_224": _Published("token", 1024, (20, 40), (0.2, 0.15), (20, 10), 0.99, 12),
    "vit_huge_patch16_224": _Published("token", 512, (30, 40), (0.3, 0.35), (20, 20), 0.995, 16),
    "vit_huge_patch14_224": _Published("token", 512, (30, 40), (0.3, 0.35), (20, 20), 0.995, 16),
}


def _mae_released() -> StageSettings:
    """M: 800 epochs (the released weights took 1600), batch 4096, 40 warm-up epochs."""
    return methods.get("mae").Settings(epochs=800, batch_size=4096, warmup=40 / 800)


def _published(model: str, method: str, aug: bool) -> Recipe:
    size, variant = _SIZES.get(model), int(aug)
    known = size is not None
    size = size or replace(_SIZES["vit_base_patch16_224"], frozen_blocks=-1)
    if method == "mae":
        source = "MAE's released recipe (M)" if known else "after MAE's released recipe (M), which has no such model"
        return Recipe(source, (("mae", _mae_released()),), {"positions": "sincos", "global_pool": "token"})
    augmentation = "byol" if aug else "minimal"
    mae = methods.get("mae").Settings(epochs=800, batch_size=size.batch, warmup=20 / 800, crops=2)
    if model == "vit_huge_patch14_224":
        # C starts this size from M's weights, which took twice the script's epochs.
        mae = replace(_mae_released(), epochs=1600, warmup=40 / 1600)
    head = methods.get("nnclr").Settings(batch_size=size.batch, augmentation=augmentation)
    tuning = methods.get("maect").Settings(
        epochs=size.tuning_epochs[variant],
        batch_size=size.batch,
        augmentation=augmentation,
        base_lr=1e-4,
        head_base_lr=5e-4 if aug else 1e-4,
        temperature=size.temperature[variant],
        top_k=size.top_k[variant],
        projector_ema=size.projector_ema,
        frozen_blocks=size.frozen_blocks,
    )
    name = "MAE-CT aug" if aug else "MAE-CT"
    source = (
        f"{name}'s published settings (C)" if known else f"after {name}'s B/16 settings (C), which has no such model"
    )
    stages = {"mae": mae, "nnclr": head, "maect": tuning}
    order = {"nnclr": ("nnclr",), "maect": ("mae", "nnclr", "maect")}[method]
    encoder = {"positions": "sincos", "global_pool": size.pool}
    return Recipe(source, tuple((stage, stages[stage]) for stage in order), encoder)


def _digits(method: str) -> Recipe:
    """Ours, found by trial on the embedded digits with the small ViT."""
    mae = methods.get("mae").Settings(
        epochs=40, batch_size=64, base_lr=4e-3, warmup=0.1, crop_scale=(0.6, 1.0), flip=0.0,
        decoder_dim=64, decoder_depth=2, decoder_heads=2,
    )  # fmt: skip
    contrastive = {
        "batch_size": 64, "augmentation": "minimal", "crop_scale": (0.4, 1.0), "flip": 0.0,
        "projector_hidden": 256, "predictor_hidden": 512, "embedding": 64, "queue_size": 1024,
    }  # fmt: skip
    head = methods.get("nnclr").Settings(epochs=6, base_lr=1e-3, **contrastive)
    tuning = methods.get("maect").Settings(
        epochs=26, base_lr=4e-3, head_base_lr=1e-3, top_k=5, projector_ema=0.99, weight_ema=0.99, **contrastive
    )
    stages = {"mae": mae, "nnclr": head, "maect": tuning}
    order = {"mae": ("mae",), "nnclr": ("nnclr",), "maect": ("mae", "nnclr", "maect")}[method]
    encoder = {"positions": "sincos", "global_pool": "avg"}
    return Recipe("ours, for the embedded digits", tuple((stage, stages[stage]) for stage in order), encoder)


def recipe(method: str, model: str, preset: str, embedded: bool) -> Recipe:
    """The stages of a method for a model.

    Args:
        preset: one of `PRESETS`; "auto" is "digits" for the embedded data and "plain" for others.
        embedded: whether the data are the embedded digits.

    Raises:
        BadInput: method or preset unknown.
    """
    methods.get(method)
    if preset not in PRESETS:
        raise BadInput(f"--preset {preset} is unknown; choose one of {', '.join(PRESETS)}.")
    if preset == "digits" or (preset == "auto" and embedded):
        return _digits(method)
    return _published(model.partition(".")[0], method, preset == "aug")

"""MIM-Refiner, last stage: the encoder learns through nearest-neighbour heads on several of its late blocks (Alkin et al.,
"MIM-Refiner: A Contrastive Learning Boost from Intermediate Pre-Trained Representations", ICLR 2025)."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.core.errors import BadInput
from engine.core.optim import Group, scaled_lr, with_decay
from engine.methods.mim_heads import MimHeads
from engine.methods.mim_heads import Settings as HeadSettings
from engine.model.vit import VisionTransformer

PREFIX = ("encoder.cls_token", "encoder.reg_token")  # without weight decay, as in MIM-Refiner


@dataclass(frozen=True)
class Settings(HeadSettings):
    """Refinement. `base_lr` and `weight_decay` are the encoder's; the heads have their own."""

    epochs: int = 30
    base_lr: float = 4e-4
    weight_decay: float = 0.05
    warmup: float = 4 / 30
    head_base_lr: float = 4e-4
    head_weight_decay: float = 1e-5
    layer_decay: float = 0.65
    """Block k of L, from 0, trains at layer_decay ** (L - k) of the learning rate, the final norm at all of it."""
    frozen_blocks: int = 0
    """Blocks from below that stay as they are, and with the first one the patch embedding."""
    weight_ema: float = 0.9999
    top_k: int = 20

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {
            "head-base-lr": (self.head_base_lr > 0, "a number above 0"),
            "head-weight-decay": (self.head_weight_decay >= 0, "a number from 0"),
            "layer-decay": (0 < self.layer_decay <= 1, "a number above 0, at most 1"),
            "frozen-blocks": (self.frozen_blocks >= 0, "a whole number from 0"),
        }

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        if self.frozen_blocks > encoder.depth:
            raise BadInput(
                f"--{stage}.frozen-blocks is {self.frozen_blocks}; it must be at most the encoder's {encoder.depth} blocks."
            )


class MimRefiner(MimHeads):
    """All heads at once, each contrasting what its own block makes of the crops, and the encoder through them."""

    name = "mim_refiner"
    Settings = Settings
    trains_encoder = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(max(encoder.layer_of(name), 0) >= settings.frozen_blocks and name != "pos_embed")

    def groups(self, images_per_step: int) -> Iterator[Group]:
        settings, depth = self.settings, self.encoder.depth
        peak_lr = scaled_lr(settings.base_lr, images_per_step)
        for layer in range(-1, depth + 1):
            named = {f"encoder.{n}": p for n, p in self.encoder.named_parameters() if self.encoder.layer_of(n) == layer}
            prefix = {name: named.pop(name) for name in PREFIX if name in named}
            rate = peak_lr * settings.layer_decay ** (depth - layer)
            yield from with_decay(named.items(), rate, settings.weight_decay)
            yield from with_decay(prefix.items(), rate, 0.0)
        yield from self.head_groups(images_per_step, settings.head_base_lr, settings.head_weight_decay)

    def flops_per_image(self) -> float:
        frozen = self.settings.frozen_blocks
        return super().flops_per_image() + 2 * sum(self.encoder.flops(self.patches(v), frozen) for v in self.views())

"""MIM-Refiner, last stage: the encoder learns through nearest-neighbour heads on several of its late blocks (Alkin et al.,
"MIM-Refiner: A Contrastive Learning Boost from Intermediate Pre-Trained Representations", ICLR 2025)."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.core.optim import Group, scaled_lr
from engine.methods.mim_heads import MimHeads
from engine.methods.mim_heads import Settings as HeadSettings
from engine.methods.parts.tuning import TuningSettings, encoder_groups, freeze
from engine.model.vit import VisionTransformer

PREFIX = ("encoder.cls_token", "encoder.reg_token")  # without weight decay, as in MIM-Refiner


@dataclass(frozen=True)
class Settings(TuningSettings, HeadSettings):
    """Refinement. `base_lr` and `weight_decay` are the encoder's; the heads have their own."""

    epochs: int = 30
    base_lr: float = 4e-4
    weight_decay: float = 0.05
    warmup: float = 4 / 30
    head_base_lr: float = 4e-4
    weight_ema: float = 0.9999
    top_k: int = 20

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | self.tuning_rules()

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        self.check_tuning(stage, encoder)


class MimRefiner(MimHeads):
    """All heads at once, each contrasting what its own block makes of the crops, and the encoder through them."""

    name = "mim_refiner"
    Settings = Settings
    trains_encoder = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        freeze(encoder, settings.frozen_blocks)

    def groups(self, images_per_step: int) -> Iterator[Group]:
        s = self.settings
        peak_lr = scaled_lr(s.base_lr, images_per_step)
        yield from encoder_groups(self.encoder, peak_lr, s.weight_decay, s.layer_decay, lowest=-1, undecayed=PREFIX)
        yield from self.head_groups(images_per_step, s.head_base_lr, s.head_weight_decay)

    def flops_per_image(self) -> float:
        frozen = self.settings.frozen_blocks
        return super().flops_per_image() + 2 * sum(self.encoder_flops(self.shown(v), frozen) for v in self.views())

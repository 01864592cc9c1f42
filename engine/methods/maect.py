"""MAE-CT, stage three: contrastive tuning of a pre-trained MAE's upper blocks (Lehner et al., "Contrastive Tuning: A Little
Help to Make Masked Autoencoders Forget", AAAI 2024)."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.optim import Average, Group, scaled_lr
from engine.methods.base import Method
from engine.methods.nnclr import DroppingSettings, Nnclr
from engine.methods.parts.tuning import TuningSettings, encoder_groups, freeze
from engine.methods.settings import depth_on_host
from engine.model.heads import head_flops
from engine.model.tokens import Packed
from engine.model.vit import VisionTransformer

FROZEN = {"same": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings(TuningSettings, DroppingSettings):
    """Contrastive tuning. `base_lr` and `weight_decay` are the encoder's; the head has its own."""

    epochs: int = 20
    base_lr: float = 1e-4
    warmup: float = 0.2
    crop_scale: tuple[float, float] = (0.08, 1.0)
    weight_decay: float = 0.05
    frozen_blocks: int = -1
    """Blocks from below that stay as they are, and with the first one the patch embedding; -1 is the lower half."""
    frozen_precision: str = "same"
    """What the frozen blocks compute in: same (as the others), bf16 or fp16; lower is cheaper than the paper's."""
    projector_ema: float = 0.99
    """Momentum of the projector's average, which makes queries and queue."""
    weight_ema: float = 0.9999
    top_k: int = 20

    def rules(self) -> dict[str, tuple[bool, str]]:
        own = {
            "projector-ema": (0 <= self.projector_ema < 1, "a number from 0 to below 1"),
            "frozen-precision": (self.frozen_precision in FROZEN, f"one of {', '.join(FROZEN)}"),
            "frozen-blocks": (self.frozen_blocks >= -1, "a whole number from 0, or -1 for the lower half"),
        }
        return super().rules() | self.tuning_rules() | own

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        self.check_tuning(stage, encoder)

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return depth_on_host(encoder)


class Maect(Nnclr):
    """NNCLR through the upper blocks, queries and queue from an average of the projector, neighbours drawn from the top k."""

    name = "maect"
    Settings = Settings
    trains_encoder = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.frozen = len(encoder.blocks) // 2 if settings.frozen_blocks < 0 else settings.frozen_blocks
        self.projector_average = deepcopy(self.projector).requires_grad_(False)
        freeze(encoder, self.frozen)

    @property
    def reuse(self) -> int:
        return 0  # of an encoder that changes, nothing can be used again

    def pooled(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, ...]:
        tokens = self.encoder.run_blocks(self.frozen_tokens(images, drawn), self.frozen)
        groups = Packed(self.encoder.norm(tokens.tokens_TC), tokens.layout).unpack()
        return tuple(self.encoder.pool(tokens_bLC) for tokens_bLC in groups)

    def frozen_tokens(self, images: tuple[Tensor, ...], drawn: dict[str, Tensor]) -> Packed:
        """What the frozen blocks put out; autograd keeps nothing of them, and they compute in a precision of their own."""
        views, dtype = self.seen(images, drawn.get("noise")), FROZEN[self.settings.frozen_precision]
        device = images[0].device.type
        with torch.set_grad_enabled(self.frozen == 0):
            if dtype is None:
                return self.encoder.run_blocks(self.encoder.embed(views, self.patch_size), 0, self.frozen)
            with torch.autocast(device, dtype=dtype):
                packed = self.encoder.run_blocks(self.encoder.embed(views, self.patch_size), 0, self.frozen)
        return Packed(packed.tokens_TC.float(), packed.layout)

    def query(self, projected: list[Tensor], pooled: list[Tensor]) -> list[Tensor]:
        return [self.projector_average(view_bC.detach()) for view_bC in pooled]

    def groups(self, images_per_step: int) -> Iterator[Group]:
        s = self.settings
        # Both views count as images in MAE-CT's scaling rule.
        peak_lr = scaled_lr(s.base_lr, 2 * images_per_step)
        yield from encoder_groups(self.encoder, peak_lr, s.weight_decay, s.layer_decay, lowest=0)
        yield from self.head_groups(images_per_step, s.head_base_lr, s.head_weight_decay)

    def flops_per_image(self) -> float:
        tuned = 4 * self.encoder_flops(self.keep, self.frozen)
        return super().flops_per_image() + tuned + 2 * head_flops(self.projector_average)

    def averages(self) -> Iterator[Average]:
        yield from super().averages()
        pairs = list(zip(self.projector_average.parameters(), self.projector.parameters()))
        yield Average(pairs, 1 - self.settings.projector_ema**self.moment.growth)

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        super().after_step(applied)
        # The average runs in train mode, so its own statistics are never read: they follow the projector's.
        for average, online in zip(self.projector_average.buffers(), self.projector.buffers()):
            average.copy_(online)

    def inherit(self, earlier: Method) -> None:
        super().inherit(earlier)
        self.projector_average.load_state_dict(self.projector.state_dict())

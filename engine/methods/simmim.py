"""SimMIM (Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022).

Shapes: b images, U mask units of an image, H hidden ones, I patches of a unit, N patches of an image, M = H * I masked ones, L
tokens of an image, C encoder width, P patch size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import kernels
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group, scaled_lr, with_decay
from engine.data.views import Augmentation, minimal
from engine.methods.base import Method
from engine.methods.settings import StageSettings, depth_on_host
from engine.model.heads import PixelDecoder, head_flops
from engine.model.initialisation import KINDS
from engine.model.tokens import View, random_masking
from engine.model.vit import VisionTransformer

TOKEN = "encoder.cls_token"


@dataclass(frozen=True)
class Settings(StageSettings):
    """SimMIM; the defaults are the released ViT-B recipe's (see engine/recipes/simmim.py for sources)."""

    epochs: int = 800
    batch_size: int = 2048
    base_lr: float = 0.5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 10 / 800
    schedule: str = "steps"
    drops: tuple[float, ...] = (700 / 800,)
    clip_norm: float = 5.0
    crop_scale: tuple[float, float] = (0.67, 1.0)
    mask_unit: int = 32
    """Side in pixels of the squares that are hidden whole."""
    decay_token: bool = True
    """Let the class token decay."""
    mask_ratio: float = 0.6
    """Share of the squares that are hidden, rounded up to whole ones."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            "mask-unit": (self.mask_unit >= 1, "a whole number from 1"),
            "mask-ratio": (0 < self.mask_ratio < 1, "a share between 0 and 1"),
        }

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        unit, patch, (height, width) = self.mask_unit, encoder.patch_size, encoder.img_size
        if unit % patch or height % unit or width % unit:
            raise BadInput(
                f"--{stage}.mask-unit is {unit}; it must be a multiple of the patch size {patch} and divide both sides of the "
                f"model's {height} x {width} pixels."
            )
        units = (height // unit) * (width // unit)
        if self.hidden_of(units) == units:
            raise BadInput(
                f"--{stage}.mask-ratio is {self.mask_ratio}; of the image's {units} squares of {unit} pixels that hides all: "
                f"choose less, or a smaller --{stage}.mask-unit."
            )

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return depth_on_host(encoder)

    def hidden_of(self, units: int) -> int:
        """How many of so many squares are hidden."""
        return math.ceil(units * self.mask_ratio - 1e-6)  # 0.55 * 100 is 55.00000000000001


class Simmim(Method):
    """Hide squares of patches behind a token that the encoder sees in their place, and predict their pixels by one linear layer.

    Only hidden patches are predicted, since only they have a loss. The paper's head, a convolution of kernel 1 and a pixel
    shuffle, is this linear layer with its outputs in another order.
    """

    name = "simmim"
    Settings = Settings

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        (rows, columns), side = encoder.grid, settings.mask_unit // encoder.patch_size
        patches = torch.arange(rows * columns).view(rows // side, side, columns // side, side)
        self.register_buffer("patches_UI", patches.transpose(1, 2).reshape(-1, side**2), persistent=False)
        self.units = len(self.patches_UI)
        self.hidden_units = settings.hidden_of(self.units)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        start = encoder.architecture.initialisation
        KINDS[start].token(self.mask_token)  # as the class token
        self.decoder = PixelDecoder(encoder.embed_dim, encoder.patch_size, 0, start)

    def views(self) -> tuple[Augmentation, ...]:
        return (
            replace(
                minimal(self.size, self.settings.crop_scale),
                flip=self.settings.flip,
                resize=self.settings.resize,
            ),
        )

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        return super().draw(draws) | {"noise": draws.uniform(self.units)}

    def masked(self, noise_bU: Tensor) -> Tensor:
        """The patches int64 [b, M] of the squares that random numbers hide: the same number of each image."""
        _, hidden_bH = random_masking(noise_bU, self.units - self.hidden_units)
        return self.patches_UI[hidden_bH].flatten(1)

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        masked_bM = self.masked(drawn["noise"])
        return {"loss": self.pixel_loss(self.predict(images[0], masked_bM, drawn), images[0], masked_bM)}

    def predict(self, images: Tensor, masked_bM: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Pixels [b, M, P*P*3] of the masked patches, under stochastic depth as drawn."""
        patches = self.patches_of_crop
        hidden_bN = images.new_zeros((len(images), patches), dtype=torch.bool).scatter(1, masked_bM, True)
        view = View(images, hidden=hidden_bN, blank=self.mask_token[0, 0])
        (tokens_bLC,) = self.encode([view], drawn)
        rows_bMC = (masked_bM + self.encoder.num_prefix_tokens)[..., None].expand(-1, -1, tokens_bLC.shape[2])
        return self.decoder(tokens_bLC.gather(1, rows_bMC))

    def pixel_loss(self, prediction_bMp: Tensor, images: Tensor, masked_bM: Tensor) -> Tensor:
        """Mean absolute error over all masked pixels of the normalised images (section 3.4)."""
        target_bMp = kernels.gather_patches(images, masked_bM, self.encoder.patch_size)
        return (prediction_bMp.float() - target_bMp).abs().mean()

    def groups(self, images_per_step: int) -> Iterator[Group]:
        peak_lr, decay = scaled_lr(self.settings.base_lr, images_per_step), self.settings.weight_decay
        named = dict(self.named_parameters())
        bare = {} if self.settings.decay_token else {name: named.pop(name) for name in (TOKEN,) if name in named}
        yield from with_decay(named.items(), peak_lr, decay)
        yield from with_decay(bare.items(), peak_lr, 0.0)

    def flops_per_image(self) -> float:
        patches = self.patches_of_crop
        masked = self.hidden_units * self.patches_UI.shape[1]
        return 3 * (self.encoder_flops(patches, thinned=True) + masked * head_flops(self.decoder))

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield self, "pixel_loss"

    @torch.no_grad()
    def reconstruct(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """For pictures: which patches were masked, int64 [b, M], and what was predicted for them, [b, M, P*P*3]."""
        masked_bM = self.masked(draws.uniform(self.units))
        return masked_bM, self.predict(images, masked_bM, {}).float()

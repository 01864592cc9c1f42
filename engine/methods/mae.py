"""Masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
from engine.core.draws import Draws
from engine.core.optim import Group, scaled_lr, with_decay
from engine.data.views import Augmentation, minimal
from engine.methods.base import Method, StageSettings
from engine.model.heads import Decoder
from engine.model.tokens import View, random_masking
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(StageSettings):
    """MAE; the defaults are the released recipe's (see engine/recipes/mae.py for sources)."""

    crops: int = 1
    """Random crops of an image in a step, each masked on its own; they count in the learning rate's scaling."""
    mask_ratio: float = 0.75
    normalise_pixels: bool = True
    """Targets are pixels normalised within their patch."""
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def rules(self) -> dict[str, tuple[bool, str]]:
        divides = self.decoder_heads > 0 and self.decoder_dim % self.decoder_heads == 0
        return {
            "crops": (self.crops >= 1, "a whole number from 1"),
            "mask-ratio": (0 < self.mask_ratio < 1, "a share between 0 and 1"),
            "decoder-depth": (self.decoder_depth >= 1, "a whole number from 1"),
            "decoder-dim": (self.decoder_dim >= 4 and self.decoder_dim % 4 == 0, "a positive multiple of 4"),
            "decoder-heads": (divides, f"a divisor of the decoder's width {self.decoder_dim}"),
        }

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return ""


class Mae(Method):
    """Predict the pixels of masked patches from the visible ones."""

    name = "mae"
    Settings = Settings

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.patches = encoder.grid[0] * encoder.grid[1]
        self.keep = int(self.patches * (1 - settings.mask_ratio))
        self.decoder = Decoder(
            encoder.embed_dim,
            encoder.grid,
            encoder.patch_size,
            encoder.num_prefix_tokens,
            settings.decoder_dim,
            settings.decoder_depth,
            settings.decoder_heads,
        )

    def views(self) -> tuple[Augmentation, ...]:
        view = replace(minimal(self.encoder.img_size, self.settings.crop_scale), flip=self.settings.flip)
        return (view,) * self.settings.crops

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        # One row per image, its crops side by side.
        return {"noise": draws.uniform(self.settings.crops, self.patches)}

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        # Crops become rows of one batch, crop by crop.
        pixels = torch.cat(images) if len(images) > 1 else images[0]
        visible_BV, masked_BM = random_masking(drawn["noise"].transpose(0, 1).flatten(0, 1), self.keep)
        return {"loss": self.pixel_loss(self.predict(pixels, visible_BV, masked_BM), pixels, masked_BM)}

    def predict(self, images: Tensor, visible_BV: Tensor, masked_BM: Tensor) -> Tensor:
        """Pixels [B, M, P*P*3] of the masked patches, normalised within the patch if the targets are."""
        (latent_BLC,) = self.encoder.encode([View(images, visible_BV)]).unpack()
        return self.decoder(latent_BLC, visible_BV, masked_BM)

    def pixel_loss(self, prediction_BMp: Tensor, images: Tensor, masked_BM: Tensor) -> Tensor:
        """Mean squared error within each masked patch, then over all masked patches (section 3, "Reconstruction target")."""
        return kernels.masked_pixel_loss(
            prediction_BMp, images, masked_BM, self.encoder.patch_size, self.settings.normalise_pixels
        )

    def groups(self, images_per_step: int) -> Iterator[Group]:
        peak_lr = scaled_lr(self.settings.base_lr, self.settings.crops * images_per_step)
        return with_decay(self.named_parameters(), peak_lr, self.settings.weight_decay)

    def flops_per_image(self) -> float:
        return 3 * self.settings.crops * (self.encoder.flops(self.keep) + self.decoder.flops(self.keep))

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        for block in self.decoder.decoder_blocks:
            yield block, "forward"
        yield self, "pixel_loss"

    def regions_on_gpus(self) -> Iterator[tuple[object, str]]:
        yield from super().regions_on_gpus()
        yield self.decoder, "assemble"
        yield self.decoder, "predict"

    @torch.no_grad()
    def reconstruct(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """For pictures: which patches were masked, int64 [B, M], and what was predicted for them, [B, M, P*P*3]."""
        visible_BV, masked_BM = random_masking(draws.uniform(self.patches), self.keep)
        return masked_BM, self.predict(images, visible_BV, masked_BM).float()

"""Masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
from engine.core.draws import Draws
from engine.core.optim import Group, scaled_lr, with_decay
from engine.data.views import Augmentation, minimal
from engine.methods.base import Method
from engine.methods.settings import StageSettings
from engine.model.heads import Decoder
from engine.model.shapes import Alike, by_shape
from engine.model.tokens import random_masking
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(StageSettings):
    """MAE; the defaults are the released recipe's (see engine/recipes/mae.py for sources)."""

    crops: int = 1
    """Random crops of an image in a step, each masked on its own; they count in the learning rate's scaling."""
    mask_ratio: float = 0.75
    decode_share: float = 1.0
    """Share of the masked patches that are decoded and learned from, others for each image and step."""
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
            "decode-share": (0 < self.decode_share <= 1, "a share above 0, at most 1"),
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
    shrinks = drops_patches = keeps_aspect = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.decoder = Decoder(
            encoder.embed_dim,
            encoder.grid,
            encoder.patch_size,
            encoder.num_prefix_tokens,
            settings.decoder_dim,
            settings.decoder_depth,
            settings.decoder_heads,
            encoder.architecture.interpolation,
        )

    @property
    def keep(self) -> int:
        """How many patches of a crop are visible."""
        return self.visible_of(self.patches_of_crop)

    @property
    def decoded(self) -> int:
        """How many of the masked ones are decoded."""
        return self.decoded_of(self.patches_of_crop)

    def visible_of(self, patches: int) -> int:
        """`keep` of a crop of so many patches."""
        visible = max(1, int(patches * (1 - self.settings.mask_ratio)))
        return visible if self.phase.keep == 1 else self.phase.kept(visible)

    def decoded_of(self, patches: int) -> int:
        """`decoded` of a crop of so many patches."""
        return max(1, round(self.settings.decode_share * (patches - self.visible_of(patches))))

    def views(self) -> tuple[Augmentation, ...]:
        view = replace(
            minimal(self.size, self.settings.crop_scale),
            flip=self.settings.flip,
            resize=self.settings.resize,
            patch=self.own_aspect,
            sides=self.phase.sides,
        )
        return (view,) * self.settings.crops

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        # One row per image, its crops side by side.
        return {"noise": draws.uniform(self.settings.crops, self.patches_of_crop)}

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        # Crops become rows of one batch, crop by crop.
        pixels = torch.cat(images) if len(images) > 1 else images[0]
        noise_BN, sizes_BV2 = drawn["noise"].transpose(0, 1).flatten(0, 1), drawn.get("sizes")
        alike = by_shape(pixels, None if sizes_BV2 is None else sizes_BV2.transpose(0, 1).flatten(0, 1))
        visible, masked = zip(*(self.split(group.of(noise_BN), group.images) for group in alike), strict=True)
        predicted = self.predict(alike, visible, masked)
        losses = [
            self.pixel_loss(prediction_BMp, group.images, masked_BM)
            for prediction_BMp, group, masked_BM in zip(predicted, alike, masked, strict=True)
        ]
        if len(losses) == 1:
            return {"loss": losses[0]}
        # every image counts alike, whatever its shape: so micro-batches and ranks learn what one batch would
        shares = [len(group.images) / len(pixels) for group in alike]
        return {"loss": sum(share * loss for share, loss in zip(shares, losses, strict=True))}

    def split(self, noise_BN: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Visible [B, V] and masked patches [B, M] of images of one shape, by the first of the noise; the latter in random order
        and no more than are decoded."""
        patches = images[0, 0].numel() // self.patch_size**2
        visible_BV, masked_BM = random_masking(noise_BN[:, :patches], self.visible_of(patches))
        return visible_BV, masked_BM[:, : self.decoded_of(patches)]

    def predict(self, alike: Sequence[Alike], visible: Sequence[Tensor], masked: Sequence[Tensor]) -> list[Tensor]:
        """Pixels [B, M, P*P*3] of the masked patches, normalised within the patch if the targets are; of images shape by shape,
        in one pass."""
        side = self.patch_size
        views = [group.view(seen) for group, seen in zip(alike, visible, strict=True)]
        latents = self.encoder.encode(views, patch_size=side).unpack()
        grids = [(group.images.shape[2] // side, group.images.shape[3] // side) for group in alike]
        return self.decoder(latents, visible, masked, grids, side)

    def pixel_loss(self, prediction_BMp: Tensor, images: Tensor, masked_BM: Tensor) -> Tensor:
        """Mean squared error within each masked patch, then over all masked patches (section 3, "Reconstruction target")."""
        return kernels.masked_pixel_loss(
            prediction_BMp, images, masked_BM, self.patch_size, self.settings.normalise_pixels
        )

    def groups(self, images_per_step: int) -> Iterator[Group]:
        peak_lr = scaled_lr(self.settings.base_lr, self.settings.crops * images_per_step)
        return with_decay(self.named_parameters(), peak_lr, self.settings.weight_decay)

    def flops_per_image(self) -> float:
        # with the images' own aspect a bound from above: the nearest grid may have fewer patches
        decoder = self.decoder.flops(self.keep, self.decoded, self.patch_size)
        return 3 * self.settings.crops * (self.encoder_flops(self.keep) + decoder)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        for block in self.decoder.decoder_blocks:
            yield block, "forward"
        yield self, "pixel_loss"

    def regions_on_gpus(self) -> Iterator[tuple[object, str]]:
        yield from super().regions_on_gpus()
        whole = self.decoded == self.patches_of_crop - self.keep
        yield self.decoder, "assemble" if whole else "assemble_some"
        yield self.decoder, "predict" if whole else "predict_last"

    @torch.no_grad()
    def reconstruct(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """For pictures: which patches were masked, int64 [B, M], and what was predicted for them, [B, M, P*P*3]."""
        visible_BV, masked_BM = random_masking(draws.uniform(self.patches_of_crop), self.keep)
        (prediction_BMp,) = self.predict([Alike(images)], [visible_BV], [masked_BM])
        return masked_BM, prediction_BMp.float()

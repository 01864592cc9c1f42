"""Weights under judgement, and how they are run: what a protocol asks for features, for maps of patches, or for a model to train.

Shapes: B batch, C width, h x w patches of an image, N = h * w.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.data.sources import ImageSet
from engine.evals.extraction import extract
from engine.evals.features import Encoder, Features
from engine.model.tokens import Packed, View
from engine.model.vit import VisionTransformer

LAYERS = ("norm", "keys")


@dataclass(frozen=True)
class Subject:
    """Weights under judgement.

    Args:
        name: for titles and messages.
        encoder: how images become features.
        device: where it lies and protocols compute.
        precision: "fp32", or "bf16" for autocast.
        batch_size: images encoded at a time.
        threads: of loaders; None takes what the machine has.
        cache: folder of extracted features; None keeps nothing.
        together: all ranks extract features together, each its share.
        object_size: (H, W) of the input made of images of a set with objects; None takes the encoder's.
        resize, squeeze, aspect: how images whose features are extracted become inputs, as for `extract`.
    """

    name: str
    encoder: Encoder
    device: torch.device = torch.device("cpu")  # noqa: RUF009, a device cannot be changed
    precision: str = "fp32"
    batch_size: int = 256
    threads: int | None = None
    cache: Path | None = None
    object_size: tuple[int, int] | None = None
    together: bool = False
    resize: str = "bicubic"
    squeeze: bool = False
    aspect: str = "crop"

    def features(self, images: ImageSet, tokens: bool = False, size: tuple[int, int] | None = None) -> Features:
        """Pooled features of a set, on the device, and its patch tokens, of inputs of `size`; raises BadInput as `extract`."""
        return extract(
            replace(self.encoder, size=size) if size else self.encoder,
            images,
            name=self.name,
            tokens=tokens,
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            cache=self.cache,
            together=self.together,
            resize=self.resize,
            squeeze=self.squeeze,
            aspect=self.aspect,
        ).to(self.device)

    @property
    def vit(self) -> VisionTransformer:
        """The judged model itself, to read. Raises BadInput for what is none, such as raw pixels."""
        if self.encoder.model is None:
            raise BadInput(
                f"{self.name} ({self.encoder.pooling}) have no patches to look at; give the weights of a ViT."
            )
        return self.encoder.model

    def check_input(self, height: int, width: int) -> None:
        """Raise BadInput for an input in pixels that the model does not take, or as `vit`."""
        model, side = self.vit, self.vit.patch_size
        if height % side or width % side or min(height, width) < side:
            raise BadInput(
                f"inputs of {width}x{height} pixels are no multiple of the patch size {side} of {self.name}; choose another size."
            )
        if model.rel_pos_bias is not None and (height, width) != model.img_size:
            raise BadInput(
                f"{self.name} has relative positions, for inputs of {model.img_size[1]}x{model.img_size[0]} pixels only, not "
                f"{width}x{height}; choose that size where there is a flag for it."
            )

    def check_aspect(self) -> None:
        """Raise BadInput for a model that does not take images of any shape, or as `vit`."""
        if self.vit.rel_pos_bias is not None:
            raise BadInput(
                f"{self.name} has relative positions, for one shape of images only: leave out --aspect keep."
            )

    def trainable(self, drop_path: float = 0.0) -> VisionTransformer:
        """A copy of the model on the device, to train, in training mode; raises BadInput as `vit`."""
        return self.vit.copy(drop_path).train()

    def maps(self, images_B3HW: Tensor, layer: str = "norm", blocks: Sequence[int] = ()) -> Tensor:
        """Patch features of normalised images of any size in multiples of the patch size, fp32 [B, h, w, C].

        Args:
            layer: "norm", tokens after the final norm; or "keys", what the last block's attention compares queries with.
            blocks: instead, the outputs of these blocks (from 0), without final norm, side by side in the channels.

        Raises:
            BadInput: as `vit`, an unknown layer, or sides that are no multiples.
        """
        if not blocks:
            return self.maps_by_layer(images_B3HW, (layer,))[layer]
        return torch.cat(self._patches(images_B3HW, partial(_of_blocks, blocks=blocks)), -1)

    def maps_by_layer(self, images_B3HW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """What `maps` gives for each of these layers, from one pass. Raises BadInput as `maps`."""
        return dict(zip(layers, self._patches(images_B3HW, partial(_of_layers, layers=layers)), strict=True))

    @torch.no_grad()
    def _patches(self, images_B3HW: Tensor, run: Callable[[VisionTransformer, Packed], list[Packed]]) -> list[Tensor]:
        """fp32 [B, h, w, C] of each that `run` makes of the embedded images."""
        model = self.vit
        training = model.training
        model.eval()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                packed = model.embed([View(images_B3HW.to(self.device))])
                found = run(model, packed)
        finally:
            model.train(training)
        side = model.patch_size
        grid = images_B3HW.shape[2] // side, images_B3HW.shape[3] // side
        return [rows.unpack()[0][:, model.num_prefix_tokens :].float().unflatten(1, grid) for rows in found]


def _of_blocks(model: VisionTransformer, packed: Packed, blocks: Sequence[int]) -> list[Packed]:
    found = {}
    for start, stop in zip((-1, *sorted(blocks)[:-1]), sorted(blocks), strict=True):
        packed = found[stop] = model.run_blocks(packed, start + 1, stop + 1)
    return [found[block] for block in blocks]


def _of_layers(model: VisionTransformer, packed: Packed, layers: Sequence[str]) -> list[Packed]:
    if unknown := [layer for layer in layers if layer not in LAYERS]:
        raise BadInput(f"layer {unknown[0]!r} is none of {', '.join(LAYERS)}.")
    last, found = model.depth - 1, {}
    packed = model.run_blocks(packed, 0, last)
    if "keys" in layers:
        block = model.blocks[last]
        keys_TC = block.attn.qkv(block.norm1(packed.tokens_TC)).chunk(3, -1)[1]
        found["keys"] = Packed(keys_TC, packed.layout)
    if "norm" in layers:
        normed_TC = model.norm(model.run_blocks(packed, last).tokens_TC)
        # where the final norm follows the pooling, it is applied to each patch
        found["norm"] = Packed(model.fc_norm(normed_TC), packed.layout)
    return [found[layer] for layer in layers]

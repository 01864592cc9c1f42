"""Weights under judgement, and how they are run: what a protocol asks for features, for maps of patches, or for a model to train.

Shapes: B batch, C width, h x w patches of an image, N = h * w.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.data.sources import ImageSet
from engine.errors import BadInput
from engine.evals.extraction import extract
from engine.evals.features import Encoder, Features
from engine.tokens import Packed, View
from engine.vit import VisionTransformer

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
        object_size: (H, W) of the input made of images of a set with objects; None takes the encoder's.
    """

    name: str
    encoder: Encoder
    device: torch.device = torch.device("cpu")  # noqa: RUF009, a device cannot be changed
    precision: str = "fp32"
    batch_size: int = 256
    threads: int | None = None
    cache: Path | None = None
    object_size: tuple[int, int] | None = None

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
        ).to(self.device)

    @property
    def vit(self) -> VisionTransformer:
        """The judged model itself, to read. Raises BadInput for what is none, such as raw pixels."""
        if self.encoder.model is None:
            raise BadInput(
                f"{self.name} ({self.encoder.pooling}) have no patches to look at; give the weights of a ViT."
            )
        return self.encoder.model

    def trainable(self, drop_path: float = 0.0) -> VisionTransformer:
        """A copy of the model on the device, to train, in training mode; raises BadInput as `vit`."""
        return self.vit.copy(drop_path).train()

    @torch.no_grad()
    def maps(self, images_B3HW: Tensor, layer: str = "norm", blocks: Sequence[int] = ()) -> Tensor:
        """Patch features of normalised images of any size in multiples of the patch size, fp32 [B, h, w, C].

        Args:
            layer: "norm", tokens after the final norm; or "keys", what the last block's attention compares queries with.
            blocks: instead, the outputs of these blocks (from 0), without final norm, side by side in the channels.

        Raises:
            BadInput: as `vit`, or sides that are no multiples.
        """
        model = self.vit
        training = model.training
        model.eval()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                packed = model.embed([View(images_B3HW.to(self.device))])
                found = _of_blocks(model, packed, blocks) if blocks else [_last(model, packed, layer)]
        finally:
            model.train(training)
        side = model.patch_size
        grid = images_B3HW.shape[2] // side, images_B3HW.shape[3] // side
        parts = [rows.unpack()[0][:, model.num_prefix_tokens :].float() for rows in found]
        return torch.cat(parts, -1).unflatten(1, grid)


def _of_blocks(model: VisionTransformer, packed: Packed, blocks: Sequence[int]) -> list[Packed]:
    found = {}
    for start, stop in zip((-1, *sorted(blocks)[:-1]), sorted(blocks), strict=True):
        packed = found[stop] = model.run_blocks(packed, start + 1, stop + 1)
    return [found[block] for block in blocks]


def _last(model: VisionTransformer, packed: Packed, layer: str) -> Packed:
    if layer == "norm":
        packed = model.run_blocks(packed)
        normed_TC = model.norm(packed.tokens_TC)
        # where the final norm follows the pooling, it is applied to each patch
        return Packed(model.fc_norm(normed_TC), packed.layout)
    if layer != "keys":
        raise BadInput(f"layer {layer!r} is none of {', '.join(LAYERS)}.")
    packed = model.run_blocks(packed, 0, model.depth - 1)
    block = model.blocks[model.depth - 1]
    keys_TC = block.attn.qkv(block.norm1(packed.tokens_TC)).chunk(3, -1)[1]
    return Packed(keys_TC, packed.layout)

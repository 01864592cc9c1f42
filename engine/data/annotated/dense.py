"""Images together with their masks, through one geometry: what judging patches, pixels and boxes reads.

Training from scratch reads through DALI (`engine.data.pipeline`); here images are few, of all sizes, and masks must follow them,
so PIL decodes and torchvision resizes.

Shapes: H x W pixels of an image as stored, h x w of the input made of it, N masks.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from engine.core.errors import BadInput
from engine.data.screen import as_rgb
from engine.data.sources import ImageSet
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD


def read(images: ImageSet, index: int) -> Tensor:
    """uint8 [3, H, W] of one image; grey, palettes, CMYK, alpha and 16 bits become RGB. Raises BadInput for what is no image."""
    try:
        with images.open(index) as file, Image.open(file) as image:
            pixels = np.array(as_rgb(image))
    except Exception as error:  # decoders raise anything on hostile bytes; whatever it is, the file is bad
        path = images.root / images.paths[index]
        raise BadInput(f"the image {path} cannot be read: {str(error)[:200] or type(error).__name__}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, h, w] to fp32, by ImageNet's mean and standard deviation, as encoders want it."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - mean) / std


@dataclass(frozen=True)
class Frame:
    """How an image and its masks become an input: one geometry for both.

    Args:
        size: pixels.
        mode: "crop": the short side becomes `size`, the centre square is cut out. "short": the short side becomes `size`, then
            both sides are resized to the nearest multiple of `multiple`. "square": both sides become `size`.
        multiple: the patch size.

    Raises:
        BadInput: the size is no multiple.
    """

    size: int
    mode: Literal["crop", "short", "square"]
    multiple: int

    def __post_init__(self):
        if self.size < self.multiple or self.size % self.multiple:
            raise BadInput(f"input size {self.size} is not a multiple of the patch size {self.multiple}; choose one.")

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the input made of H x W pixels."""
        if self.mode != "short":
            return self.size, self.size
        return tuple(
            self.multiple * max(1, round(side * self.size / min(height, width) / self.multiple))
            for side in (height, width)
        )

    def image(self, pixels_3HW: Tensor) -> Tensor:
        """uint8 [3, h, w], bicubic, antialiased."""
        return self._resized(pixels_3HW, tv.InterpolationMode.BICUBIC)

    def masks(self, masks: Tensor) -> Tensor:
        """[..., h, w] of masks or label maps [..., H, W], bool or integer, by the nearest pixel."""
        flat = masks.reshape(-1, 1, *masks.shape[-2:])
        resized = self._resized(flat.to(torch.uint8), tv.InterpolationMode.NEAREST_EXACT).to(masks.dtype)
        return resized.reshape(*masks.shape[:-2], *resized.shape[-2:])

    def _resized(self, x: Tensor, how: tv.InterpolationMode) -> Tensor:
        height, width = x.shape[-2:]
        if self.mode != "crop":
            return tv.resize(x, list(self.shape(height, width)), how, antialias=True)
        share = self.size / min(height, width)
        covering = [max(self.size, round(height * share)), max(self.size, round(width * share))]
        return tv.center_crop(tv.resize(x, covering, how, antialias=True), [self.size, self.size])

"""Large-scale jitter of an image with objects; for judging the plain fit to a size, and the way back from what was found.

Ghiasi et al., Simple Copy-Paste, arXiv 2012.07177, as used by the benchmark of ViT detectors (arXiv 2111.11429): the image is
made to fit a square, times a random scale, flipped half of the time, then cut or padded to the square.

Shapes: H x W pixels of an image as stored, h x w of one that fits the square of side S, n objects, d detections. Boxes as in
`engine.data.annotated.objects`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from engine.core.errors import BadInput
from engine.data.augment import uniforms

JITTER = 16  # purpose of the draws, beside those of `engine.data.augment`
GREY = [124, 116, 104]  # ImageNet's mean: what is padded is near zero when normalised


@dataclass(frozen=True)
class Jitter:
    """Large-scale jitter.

    Args:
        size: S.
        scale: range of the scale, drawn uniformly; at 1 the longer side of the image fits the square.
        flip: probability of a horizontal flip.

    Raises:
        BadInput: numbers that make no sense.
    """

    size: int
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5

    def __post_init__(self):
        if self.size < 2:
            raise BadInput(f"the size of jittered images, {self.size}, must be at least 2.")
        if not 0 < self.scale[0] <= self.scale[1] < 100:
            raise BadInput(
                f"the scale of the jitter, {self.scale}, must be two numbers above 0, the smaller one first."
            )
        if not 0 <= self.flip <= 1:
            raise BadInput(f"the probability of a flip, {self.flip}, must be from 0 to 1.")


@dataclass(frozen=True)
class Example:
    """An image with the objects that are in sight.

    Attributes:
        image: uint8 [3, S, S].
        boxes: float32 [n, 4], around the visible part of each mask.
        labels: int64 [n].
        masks: bool [n, S, S].
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor


def jittered(
    pixels_3HW: Tensor, labels_n: np.ndarray, masks_nHW: np.ndarray, jitter: Jitter, seed: int, step: int, row: int
) -> Example:
    """An example for training, as a pure function of (seed, step, row): row is the place in the batch of that step.

    Args:
        pixels_3HW: uint8.
        labels_n: int64.
        masks_nHW: bool.

    Returns:
        objects of which nothing is left in sight are dropped, and boxes are those of the masks: an object that is cut has a box
        around what is left.
    """
    ((scale, left, top, flip),) = uniforms(slice(row, row + 1), 4, seed, JITTER, step)
    low, high = jitter.scale
    height, width = fitted(pixels_3HW.shape[1:], jitter.size * (low + (high - low) * scale))
    rows, columns = (_window(side, share, jitter.size) for side, share in ((height, top), (width, left)))
    image = tv.resize(pixels_3HW, [height, width], InterpolationMode.BILINEAR, antialias=True)
    image = tv.crop(image, rows.start, columns.start, len(rows), len(columns))
    # the nearest pixel of each, for the window only: many masks at twice the size would take gigabytes
    places = [
        ((np.array(window) + 0.5) * (before / after)).astype(int)
        for window, before, after in zip((rows, columns), masks_nHW.shape[1:], (height, width))
    ]
    masks = torch.from_numpy(masks_nHW[:, places[0][:, None], places[1]])
    if flip < jitter.flip:
        image, masks = tv.horizontal_flip(image), masks.flip(-1)
    image, masks = padded(image, jitter.size, GREY), padded(masks, jitter.size)
    seen = masks.flatten(1).any(1)
    masks, labels = masks[seen], torch.from_numpy(labels_n)[seen]
    return Example(image, boxes_of(masks), labels, masks)


def fit(pixels_3HW: Tensor, size: int) -> Tensor:
    """uint8 [3, h, w]: the whole image, its longer side S. What a detector judges, which pads it to its square itself."""
    return tv.resize(pixels_3HW, list(fitted(pixels_3HW.shape[1:], size)), InterpolationMode.BILINEAR, antialias=True)


def back(boxes_d4: Tensor, masks_dhw: Tensor, shape: tuple[int, int], sure: float = 0.5) -> tuple[Tensor, Tensor]:
    """Detections in what `fit` made, in the pixels of the image.

    Args:
        boxes_d4: float.
        masks_dhw: float, how sure each pixel is.
        shape: (H, W) of the image.
        sure: from which value on a pixel belongs to the mask.

    Returns:
        boxes float [d, 4], clipped to the image, and masks bool [d, H, W].
    """
    sides = boxes_d4.new_tensor([shape[1], shape[0]] * 2)
    boxes = (boxes_d4 * sides / boxes_d4.new_tensor([*masks_dhw.shape[:0:-1]] * 2)).clamp(min=0).minimum(sides)
    masks = torch.zeros(len(masks_dhw), *shape, dtype=torch.bool, device=masks_dhw.device)
    for place, mask in enumerate(masks_dhw):  # one by one: a hundred large ones would fill the memory
        masks[place] = tv.resize(mask[None], list(shape), InterpolationMode.BILINEAR, antialias=True)[0] >= sure
    return boxes, masks


def fitted(shape: tuple[int, int], size: float) -> tuple[int, int]:
    """(height, width) of an image of `shape` whose longer side becomes `size`, but at least 2; no side is less than a pixel."""
    share = max(2, size) / max(shape)  # to a single pixel torch 2.11 fails
    return max(1, round(shape[0] * share)), max(1, round(shape[1] * share))


def padded(x: Tensor, size: int, fill: list[int] | int = 0) -> Tensor:
    """[..., S, S], more pixels to the right and below."""
    return tv.pad(x, [0, 0, size - x.shape[-1], size - x.shape[-2]], fill=fill)


def boxes_of(masks_nHW: Tensor) -> Tensor:
    """float32 [n, 4], the smallest boxes around masks that are not empty."""
    # torchvision's end in the middle of the last pixel's place
    boxes = masks_to_boxes(masks_nHW).float()
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def _window(side: int, share: float, size: int) -> range:
    """The pixels of a side that are kept: all, or `size` of them from a place that `share` of [0, 1) decides."""
    start = int(share * (max(0, side - size) + 1))
    return range(start, min(side, start + size))

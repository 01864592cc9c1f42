"""What supervised training does to a batch of pixels on the device: mixup, CutMix, random erasing. All of it is a function of
numbers that are given.

Shapes: B images, C channels, H and W pixels, K classes, T tries, 4 is (top, bottom, left, right).
"""

import math

import torch
from scipy.special import betaincinv
from torch import Tensor

from engine.core.errors import BadInput

SMALLEST, LARGEST = 0.02, 1 / 3  # shares of the image that are erased
RATIO = 0.3  # of a rectangle's height to its width, or the other way around
TRIES = 10
ERASING = 2 * TRIES + 4  # uniform numbers that erasing takes for an image

Box = tuple[int, int, int, int]


def beta(alpha: float, uniform: float) -> float:
    """The number below which Beta(alpha, alpha) lies with the probability `uniform`: so distributed where that is uniform."""
    return float(betaincinv(alpha, alpha, uniform))


def box(size: tuple[int, int], share: float, across: float, down: float) -> Box:
    """The rectangle that CutMix takes from the other image: of the image's shape and 1 - `share` of its area, about the pixel at
    (`across`, `down`) of the whole, both from 0 to below 1; what would lie outside is cut off."""
    spans = []
    for side, place in zip(size, (down, across), strict=True):
        length, centre = int(side * math.sqrt(1 - share)), int(place * side)
        spans += [max(0, centre - length // 2), min(side, centre + (length + 1) // 2)]
    return tuple(spans)


def swapped(rows: Tensor) -> Tensor:
    """Rows [B, ...] with each pair (0, 1), (2, 3), ... exchanged.

    Raises:
        BadInput: B is odd.
    """
    if len(rows) % 2:
        raise BadInput(
            f"mixing pairs neighbours of the batch, but a rank's micro-batch has {len(rows)} images, an odd number: choose "
            "another --batch-size or --accumulate, or set mixup and cutmix to 0."
        )
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mixup(images_BCHW: Tensor, targets_BK: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`share` of each image and its target, the rest from its partner (Zhang et al. 2018, "mixup")."""
    return torch.lerp(swapped(images_BCHW), images_BCHW, share), torch.lerp(swapped(targets_BK), targets_BK, share)


def cutmix(images_BCHW: Tensor, targets_BK: Tensor, cut: Box) -> tuple[Tensor, Tensor]:
    """Each image with a rectangle from its partner, targets by area (Yun et al. 2019, "CutMix")."""
    top, bottom, left, right = cut
    mixed = images_BCHW.clone()
    mixed[:, :, top:bottom, left:right] = swapped(images_BCHW)[:, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (images_BCHW.shape[2] * images_BCHW.shape[3])
    return mixed, torch.lerp(swapped(targets_BK), targets_BK, share)


def erased_boxes(uniforms_BU: Tensor, size: tuple[int, int], probability: float) -> Tensor:
    """int64 [B, 4]: the rectangle of each image that is erased, of no area where none is (Zhong et al. 2020, algorithm 1).

    It is the first of ten tries that is smaller than the image, with 2 % to a third of its area and a ratio from 0.3 to 1 / 0.3,
    log-uniform.

    Args:
        uniforms_BU: [B, 24] in [0, 1).
    """
    height, width = size
    area_BT, ratio_BT, (happens_B, down_B, across_B, _) = (
        height * width * (SMALLEST + (LARGEST - SMALLEST) * uniforms_BU[:, :TRIES]),
        torch.exp(math.log(RATIO) * (1 - 2 * uniforms_BU[:, TRIES : 2 * TRIES])),
        uniforms_BU[:, 2 * TRIES :].unbind(1),
    )
    tall_BT, wide_BT = (area_BT * ratio_BT).sqrt().round(), (area_BT / ratio_BT).sqrt().round()
    fits_BT = (tall_BT < height) & (wide_BT < width)
    first_B1 = fits_BT.int().argmax(1, keepdim=True)
    erased_B = fits_BT.any(1) & (happens_B < probability)
    tall_B, wide_B = (sides.gather(1, first_B1)[:, 0] * erased_B for sides in (tall_BT, wide_BT))
    top_B, left_B = (down_B * (height - tall_B + 1)).floor(), (across_B * (width - wide_B + 1)).floor()
    return torch.stack([top_B, top_B + tall_B, left_B, left_B + wide_B], 1).long()


def erase(images_BCHW: Tensor, boxes_B4: Tensor, signs_B: Tensor, noise_CHW: Tensor) -> Tensor:
    """The images with noise in their rectangles: the field `noise` as it lies there, times the image's sign. All images share one
    field, so that a rank needs to draw no other rank's."""
    top, bottom, left, right = (edge[:, None] for edge in boxes_B4.unbind(1))
    rows = torch.arange(images_BCHW.shape[2], device=images_BCHW.device)
    columns = torch.arange(images_BCHW.shape[3], device=images_BCHW.device)
    within_BH, within_BW = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside_B1HW = (within_BH[:, :, None] & within_BW[:, None])[:, None]
    return torch.where(inside_B1HW, noise_CHW * signs_B[:, None, None, None], images_BCHW)

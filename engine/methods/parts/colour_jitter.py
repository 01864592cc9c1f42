"""torchvision's colour jitter of many small images at once, each by its own numbers and in an order of its own: values are cut
off at 0 and 1 between the steps, contrast turns about the mean grey, hue goes through HSV.

Shapes: ... any number of leading dimensions, H x W pixels of 3 channels before them.
"""

from functools import cache

import torch
from torch import Tensor

from engine.core.lasting import lasting

STEPS = ("brightness", "contrast", "saturation", "hue")
LUMA = (0.2989, 0.587, 0.114)


def grey(images: Tensor) -> Tensor:
    """[..., 3, H, W] -> [..., 1, H, W]: torchvision's weights."""
    red, green, blue = images.unbind(-3)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(-3)


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Images [..., 3, H, W], each changed by its four `factors` [..., 4], of `STEPS`, in its own `order`, int64 [..., 4].

    Hue's factor is a share of the circle, the others multiply. Values need not lie in [0, 1].
    """
    amounts = factors[..., None, None, None].unbind(-4)
    for turn in range(len(STEPS)):
        which = order[..., turn, None, None, None]
        changed = images
        for step, (change, amount) in enumerate(zip(_CHANGES, amounts, strict=True)):
            changed = torch.where(which == step, change(images, amount), changed)
        images = changed
    return images


def _blend(images: Tensor, other: Tensor | float, amount: Tensor) -> Tensor:
    return (amount * images + (1 - amount) * other).clamp(0, 1)


def _brighten(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, 0.0, amount)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, grey(images).mean((-3, -2, -1), keepdim=True), amount)


def _saturate(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, grey(images), amount)


def _turn_hue(images: Tensor, amount: Tensor) -> Tensor:
    red, green, blue = images.unbind(-3)
    value, span = images.amax(-3), images.amax(-3) - images.amin(-3)
    flat = span == 0
    saturation = span / torch.where(flat, 1.0, value)
    red_off, green_off, blue_off = ((value - part) / torch.where(flat, 1.0, span) for part in (red, green, blue))
    hue = torch.where(
        value == red,
        blue_off - green_off,
        torch.where(value == green, 2 + red_off - blue_off, 4 + green_off - red_off),
    )
    sixths = 6 * ((hue / 6 + 1) % 1 + amount[..., 0, :, :]).remainder(1)
    sector, past = sixths.floor(), sixths - sixths.floor()
    low, falling, rising = ((value * (1 - saturation * part)).clamp(0, 1) for part in (1, past, 1 - past))
    shades = torch.stack([value, falling, low, rising], -3)
    return shades.gather(-3, _shades_of_sixths(images.device)[:, sector.long() % 6].movedim(0, -3))


@cache  # a captured step reads them where they lie
def _shades_of_sixths(device: torch.device) -> Tensor:
    """int64 [3, 6]: which of value, falling, low and rising each channel takes in each sixth of the circle."""
    with lasting():
        return torch.tensor([[0, 1, 2, 2, 3, 0], [3, 0, 0, 1, 2, 2], [2, 2, 3, 0, 0, 1]]).to(device)


_CHANGES = (_brighten, _contrast, _saturate, _turn_hue)

"""Inference by sliding windows: an image is judged in windows of the size that was trained on.

Shapes: B images, K classes, H x W pixels, S the side of a window.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one moved back to end with the side."""
    return [min(start, length - window) for start in range(0, max(0, length - window) + stride, stride)]


def slide(
    logits_of: Callable[[Tensor], Tensor], images_B3HW: Tensor, window: int, stride: int, at_once: int = 16
) -> Tensor:
    """Logits of whole images; where windows overlap, their mean.

    Args:
        logits_of: of windows [b, 3, S, S], as [b, K, S, S].
        images_B3HW: normalised; those smaller than the window are padded by zeros, the mean colour, at the right and below.
        window: S.
        stride: from 1 to S.
        at_once: windows given to `logits_of` at a time.

    Returns:
        fp32 [B, K, H, W].
    """
    count, _, height, width = images_B3HW.shape
    padded = F.pad(images_B3HW, (0, max(0, window - width), 0, max(0, window - height)))
    tops, lefts = (starts(side, window, stride) for side in padded.shape[2:])
    places = list(product(range(count), tops, lefts))
    total = padded.new_zeros(())
    times_HW = padded.new_zeros(padded.shape[2:])
    for first in range(0, len(places), at_once):
        part = places[first : first + at_once]
        found = logits_of(torch.stack([padded[i, :, y : y + window, x : x + window] for i, y, x in part]))
        if not total.ndim:
            total = padded.new_zeros(count, found.shape[1], *padded.shape[2:])
        for (image, top, left), logits in zip(part, found, strict=True):
            total[image, :, top : top + window, left : left + window] += logits
            if image == 0:
                times_HW[top : top + window, left : left + window] += 1
    return (total / times_HW)[:, :, :height, :width]

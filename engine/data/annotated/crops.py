"""Training crops for segmentation: an image and the class of its every pixel through one random geometry.

The pipeline of mmseg's ADE20K recipes, in its order: random resize, random crop, horizontal flip, photometric distortion (of SSD:
Liu et al. 2016, arXiv 1512.02325, in torchvision's form and strengths, without its swaps of channels), padding. Every number
drawn is a pure function of (seed, step, place in the batch), as in `engine.data.augment`.

Shapes: H x W pixels of an image as stored, S the side of a crop, B crops of a batch, U uniform numbers of a crop.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from engine.data import ahead
from engine.data.annotated import dense
from engine.data.annotated.objects import VOID, SemanticSet
from engine.data.augment import epoch_order, uniforms
from engine.data.views import IMAGENET_MEAN

_CROP = 3  # purpose of these draws: the first key, after those of `engine.data.augment`
# columns of a crop's uniform numbers; the photometric ones come in pairs (whether, how much)
_RATIO, _FLIP, _CONTRAST_FIRST, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (0, 1, 2, 4, 6, 8, 10)
_PLACES = 12  # from here, (top, left) of every place that is tried
MOST_TRIES = 10
COLUMNS = _PLACES + 2 * MOST_TRIES
_PADDING = [round(255 * mean) for mean in IMAGENET_MEAN]  # zero after normalisation, nearly


@dataclass(frozen=True)
class Cropping:
    """How crops are made.

    Args:
        size: S, the side of a crop in pixels; what an image lacks is padded at the right and below, its class being 255.
        short: pixels that an image's short side is brought to, before the ratio.
        ratio: range of the factor on it, drawn uniformly.
        flip: probability of a horizontal flip.
        photometric: whether brightness, contrast, saturation and hue are changed, each with probability one half.
        tries: places drawn, up to 10; that is taken whose most frequent class has the least share of the counted pixels (mmseg
            draws until that share is below a bound). With 1 it is the first, whatever it shows.
    """

    size: int
    short: int
    ratio: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True
    tries: int = 1


def resized(pixels_3HW: Tensor, short: float) -> Tensor:
    """uint8 [3, h, w]: the short side brought to `short` pixels, the other one in proportion; bilinear, antialiased."""
    return tv.resize(pixels_3HW, _sides(pixels_3HW, short), tv.InterpolationMode.BILINEAR, antialias=True)


def crop(cropping: Cropping, pixels_3HW: Tensor, labels_HW: Tensor, uniforms_U: np.ndarray) -> tuple[Tensor, Tensor]:
    """One crop of an image and of its label map.

    Args:
        pixels_3HW, labels_HW: uint8.
        uniforms_U: float64 [32] in [0, 1).

    Returns:
        uint8 [3, S, S] and uint8 [S, S].
    """
    u, size = uniforms_U, cropping.size
    short = cropping.short * _between(*cropping.ratio, u[_RATIO])
    labels_1HW = tv.resize(labels_HW[None], _sides(pixels_3HW, short), tv.InterpolationMode.NEAREST_EXACT)
    pixels_3HW = resized(pixels_3HW, short)
    height, width = labels_1HW.shape[1:]
    room = np.maximum([height - size, width - size], 0) + 1
    places_T2 = (u[_PLACES:].reshape(-1, 2)[: cropping.tries] * room).astype(int).tolist()
    windows = [(*place, min(size, height), min(size, width)) for place in places_T2]
    window = windows[0] if len(windows) == 1 else min(windows, key=lambda each: _monotony(tv.crop(labels_1HW, *each)))
    pixels_3HW, labels_1HW = tv.crop(pixels_3HW, *window), tv.crop(labels_1HW, *window)
    if u[_FLIP] < cropping.flip:
        pixels_3HW, labels_1HW = tv.horizontal_flip(pixels_3HW), tv.horizontal_flip(labels_1HW)
    if cropping.photometric:
        pixels_3HW = _distorted(pixels_3HW, u)
    lacking = [0, 0, size - window[3], size - window[2]]
    return tv.pad(pixels_3HW, lacking, fill=_PADDING), tv.pad(labels_1HW, lacking, fill=VOID)[0]


def batches(
    images: SemanticSet, cropping: Cropping, batch: int, steps: int, seed: int, threads: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of crops: normalised images fp32 [B, 3, S, S] and classes int64 [B, S, S], 255 not to be counted.

    The images come in random order, each once before any comes again. Raises BadInput, at its place, for an image or a label map
    that cannot be read.
    """

    order = lru_cache(maxsize=2)(lambda epoch: epoch_order(len(images), seed, epoch))

    def made(place: int) -> tuple[Tensor, Tensor]:
        step, row = divmod(place, batch)
        epoch, turn = divmod(place, len(images))
        index = int(order(epoch)[turn])
        numbers_U = uniforms(slice(row, row + 1), COLUMNS, seed, _CROP, step)[0]
        return crop(cropping, dense.read(images.images, index), torch.from_numpy(images.semantic(index)), numbers_U)

    crops = ahead.loaded(made, range(batch * steps), threads)
    for _ in range(steps):
        pixels, labels = zip(*(next(crops) for _ in range(batch)))
        yield dense.normalised(torch.stack(pixels)), torch.stack(labels).long()


def _sides(pixels_3HW: Tensor, short: float) -> list[int]:
    height, width = pixels_3HW.shape[1:]
    return [max(1, round(side * short / min(height, width))) for side in (height, width)]


def _monotony(labels: Tensor) -> float:
    """The share of the most frequent class."""
    counts = torch.bincount(labels[labels != VOID].long())
    return float(counts.max() / counts.sum()) if len(counts) else 1.0


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _distorted(pixels_3HW: Tensor, u: np.ndarray) -> Tensor:
    distort = v2.RandomPhotometricDistort()
    columns = {"brightness": _BRIGHTNESS, "contrast": _CONTRAST, "saturation": _SATURATION, "hue": _HUE}
    factors = {
        f"{name}_factor": _between(*getattr(distort, name), u[column + 1]) if u[column] < distort.p else None
        for name, column in columns.items()
    }
    # its own `make_params` draws from torch's global generator
    order = {"contrast_before": bool(u[_CONTRAST_FIRST] < 0.5), "channel_permutation": None}
    return distort.transform(pixels_3HW, factors | order)

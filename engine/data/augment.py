"""How a view is made from an image, and every random number that takes, as a pure function of (seed, step, view, row).

A number belongs to a row of the global batch and each rank draws those of its rows, so neither the number of ranks, nor
of threads, nor a restart changes a crop. Shape suffixes: B images, T tries, 2 is (width, height) or (x, y).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ORDER, VIEW = 0, 1  # purposes: the first key of a draw
TRIES = 10
SOLARIZE_FROM, NEVER = 128, 256
# columns of a view's uniform numbers
_AREA, _RATIO = slice(0, TRIES), slice(TRIES, 2 * TRIES)
_LEFT, _TOP, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SIGMA, _SOLARIZE = range(20, 32)
_COLUMNS = 32


@dataclass(frozen=True)
class Augmentation:
    """One view of an image: random resized crop, flip, colours, blur, solarisation; in this order.

    Attributes:
        size: (height, width) of the view in pixels.
        scale: range of the crop's share of the image area.
        ratio: range of the crop's width / height, drawn log-uniformly.
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter, which applies contrast, brightness, saturation, hue; in this order, in
            one linear map without clipping between. Each factor is uniform in 1 -+ its strength, floored at 0. Contrast
            turns about mid-grey (not the image's mean) and hue rotates the YIQ plane (not HSV).
        brightness, contrast, saturation: strengths of the jitter.
        hue: largest rotation, as a share of the full circle.
        grayscale: probability of dropping all colour.
        blur: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels; the kernel reaches ceil(3 sigma).
        solarize: probability of inverting the values from 128 up.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


def minimal(size: tuple[int, int], scale: tuple[float, float] = (0.2, 1.0)) -> Augmentation:
    """Crop and flip only: MAE's set with scale (0.2, 1) (arXiv 2111.06377, A.1), MAE-CT's with (0.08, 1)."""
    return Augmentation(size, scale)


def byol_views(size: tuple[int, int], scale: tuple[float, float] = (0.08, 1.0)) -> tuple[Augmentation, Augmentation]:
    """The two views of BYOL (arXiv 2006.07733, appendix B), as MAE-CT's augmented variant uses them."""
    colours = {"jitter": 0.8, "grayscale": 0.2}
    return (
        Augmentation(size, scale, blur=1.0, **colours),
        Augmentation(size, scale, blur=0.1, solarize=0.2, **colours),
    )


def multi_crop(
    size: tuple[int, int],
    local_size: tuple[int, int],
    globals_: int,
    locals_: int,
    scale: tuple[float, float],
    local_scale: tuple[float, float],
    colours: bool = True,
) -> tuple[Augmentation, ...]:
    """Large crops, then small ones (SwAV, DINO). With colours the large ones are BYOL's two views in turn, and the small ones
    are blurred half of the time, as in DINO (arXiv 2104.14294); without, all are cropped and flipped only.
    """
    if not colours:
        return (minimal(size, scale),) * globals_ + (minimal(local_size, local_scale),) * locals_
    pair = byol_views(size, scale)
    local = Augmentation(local_size, local_scale, jitter=0.8, grayscale=0.2, blur=0.5)
    return tuple(pair[view % 2] for view in range(globals_)) + (local,) * locals_


def uniforms(rows: slice, columns: int, *keys: int) -> np.ndarray:
    """float64 [rows, columns] in [0, 1): these rows of an endless table that is a pure function of the keys.

    The generator is Philox (Salmon et al. 2011), which counts: it starts at any row. `columns` is a multiple of 4.
    """
    generator = np.random.Philox(np.random.SeedSequence(keys))
    generator.advance(rows.start * columns // 4)  # in blocks of four numbers
    count = rows.stop - rows.start
    return ((generator.random_raw(count * columns) >> np.uint64(11)) * 2.0**-53).reshape(count, columns)


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [images]: the permutation of the ids in this epoch."""
    keys = np.random.Philox(np.random.SeedSequence((seed, ORDER, epoch))).random_raw(images)
    return np.argsort(keys, kind="stable")


def view_uniforms(rows: slice, seed: int, step: int, view: int) -> np.ndarray:
    """float64 [rows, 32]: what `view_parameters` wants, for these rows of the global batch of a step."""
    return uniforms(rows, _COLUMNS, seed, VIEW, step, view)


def view_parameters(view: Augmentation, sizes_B2: np.ndarray, uniforms_BU: np.ndarray) -> Mapping[str, np.ndarray]:
    """The parameters of each image's view; only those that the view can need.

    Returns:
        start, shape: int32 [B, 2], the crop in pixels, (x, y) and (width, height).
        mirror: int32 [B].
        brightness, contrast, saturation, hue (degrees): float32 [B].
        sigma: float32 [B] and window: int32 [B], 0 for "from sigma", 1 for no blur.
        solarize_from: int32 [B], 256 for never.
    """
    u = uniforms_BU
    start, shape = _resized_crop(view, sizes_B2, u)
    parameters = {"start": start, "shape": shape}
    if view.flip:
        parameters["mirror"] = (u[:, _FLIP] < view.flip).astype(np.int32)
    if view.jitter or view.grayscale:
        apply = u[:, _JITTER] < view.jitter
        for name, column in (("brightness", _BRIGHTNESS), ("contrast", _CONTRAST), ("saturation", _SATURATION)):
            strength = getattr(view, name)
            low, high = max(0.0, 1 - strength), 1 + strength
            parameters[name] = np.where(apply, low + (high - low) * u[:, column], 1).astype(np.float32)
        parameters["saturation"][u[:, _GRAY] < view.grayscale] = 0
        parameters["hue"] = np.where(apply, 360 * view.hue * (2 * u[:, _HUE] - 1), 0).astype(np.float32)
    if view.blur:
        low, high = view.blur_sigma
        parameters["sigma"] = (low + (high - low) * u[:, _SIGMA]).astype(np.float32)
        parameters["window"] = np.where(u[:, _BLUR] < view.blur, 0, 1).astype(np.int32)
    if view.solarize:
        parameters["solarize_from"] = np.where(u[:, _SOLARIZE] < view.solarize, SOLARIZE_FROM, NEVER).astype(np.int32)
    return parameters


def _resized_crop(view: Augmentation, sizes_B2: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The crop of torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest centred one."""
    sides_B2 = sizes_B2.astype(np.float64)
    (low, high), (narrow, wide) = view.scale, view.ratio
    area_BT = sides_B2.prod(1, keepdims=True) * (low + (high - low) * u[:, _AREA])
    ratio_BT = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * u[:, _RATIO])
    tries_BT2 = np.round(np.sqrt(np.stack([area_BT * ratio_BT, area_BT / ratio_BT], -1)))
    fits_BT = ((tries_BT2 > 0) & (tries_BT2 <= sides_B2[:, None])).all(-1)
    first_B = fits_BT.argmax(1)
    tried_B2 = np.take_along_axis(tries_BT2, first_B[:, None, None], 1)[:, 0]
    ratio_B = np.clip(sides_B2[:, 0] / sides_B2[:, 1], narrow, wide)
    bounded_B2 = np.stack([sides_B2[:, 1] * ratio_B, sides_B2[:, 0] / ratio_B], -1)
    largest_B2 = np.maximum(np.round(np.minimum(sides_B2, bounded_B2)), 1)
    found_B1 = fits_BT.any(1)[:, None]
    shape_B2 = np.where(found_B1, tried_B2, largest_B2)
    room_B2 = sides_B2 - shape_B2
    start_B2 = np.where(found_B1, np.floor(u[:, (_LEFT, _TOP)] * (room_B2 + 1)), room_B2 // 2)
    return start_B2.astype(np.int32), shape_B2.astype(np.int32)

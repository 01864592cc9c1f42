"""How each view is drawn, crop, colours and operations: pure functions of (seed, step, view, row).

A number belongs to a row of the global batch and each rank draws those of its rows, so neither the number of ranks, nor
of threads, nor a restart changes a crop. Shape suffixes: B images, T tries, 2 is (width, height) or (x, y).
"""

from collections.abc import Mapping

import numpy as np

from engine.data.shapes import shown_sizes
from engine.data.views import Augmentation

ORDER, VIEW, RAND, TURN = 0, 1, 2, 4  # purposes: the first key of a draw
TRIES = 10
SOLARIZE_FROM, NEVER = 128, 256
# columns of a view's uniform numbers
_AREA, _RATIO = slice(0, TRIES), slice(TRIES, 2 * TRIES)
_LEFT, _TOP, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SIGMA, _SOLARIZE = range(20, 32)
_COLUMNS = 32
# RandAugment's have a table of their own, five columns for each operation
_CHOICE, _APPLY, _NOISE, _ANGLE, _SIGN = range(_COLUMNS, _COLUMNS + 5)
_RAND_COLUMNS, MAX_OPERATIONS = 16, 3
# and the order of the colour jitter's steps another one, so that what was drawn before there was one stays as it was
_TURN, _TURN_COLUMNS = _COLUMNS + _RAND_COLUMNS, 4

OPERATIONS = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize-add", "colour", "contrast", "brightness",
    "sharpness", "shear-x", "shear-y", "translate-x", "translate-y",
)  # fmt: skip
# how an operation is computed: the pipeline has one branch for each of these
NOTHING, WARP, TONES, BLEND, SHARPNESS, AUTOCONTRAST, EQUALIZE = range(7)
_KIND_OF = dict.fromkeys(OPERATIONS, TONES) | {
    "autocontrast": AUTOCONTRAST, "equalize": EQUALIZE, "sharpness": SHARPNESS, "colour": BLEND, "contrast": BLEND,
    "brightness": BLEND, "rotate": WARP, "shear-x": WARP, "shear-y": WARP, "translate-x": WARP, "translate-y": WARP,
}  # fmt: skip
STEPS = ("brightness", "contrast", "saturation", "hue")  # of the colour jitter
UNSATURATED, BEFORE_HUE, AFTER_HUE = range(3)  # when saturation changes


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
    """float64 [rows, 52]: what `view_parameters` wants, for these rows of the global batch of a step."""
    tables = ((_COLUMNS, VIEW), (_RAND_COLUMNS, RAND), (_TURN_COLUMNS, TURN))
    return np.concatenate([uniforms(rows, columns, seed, purpose, step, view) for columns, purpose in tables], 1)


def view_parameters(
    view: Augmentation, sizes_B2: np.ndarray, uniforms_BU: np.ndarray, turns_B: np.ndarray | None = None
) -> Mapping[str, np.ndarray]:
    """The parameters of each image's view; only those that the view can need. `turns_B` as in `engine.data.shapes`.

    Returns:
        start, shape: int32 [B, 2], the crop in pixels, (x, y) and (width, height).
        resized: float32 [B, 2], the (height, width) that it is brought to, where that is each image's own.
        shift: int32 [B, 2], (x, y) of the window in the image of the view's size, from -pad to pad.
        mirror: int32 [B].
        kind0, matrix0, tones0, blend0 (1, 2 for further operations): as `operation_parameters` gives them.
        brightness, contrast, saturation, hue (degrees): float32 [B], of linear colours; all colour is dropped by saturation 0.
        factors, saturates, saturation, hue_steps: of torchvision's colours, as `jitter_parameters` gives them.
        gray: int32 [B], of torchvision's colours: 1 where all colour is dropped.
        sigma: float32 [B] and window: int32 [B], 0 for "from sigma", 1 for no blur.
        solarize_from: int32 [B], 256 for never.
    """
    u = uniforms_BU
    if view.pad:
        shift_B2 = np.floor(u[:, (_LEFT, _TOP)] * (2 * view.pad + 1)) - view.pad
        parameters = {
            "start": np.zeros_like(sizes_B2),
            "shape": sizes_B2,
            "shift": shift_B2.astype(np.int32, order="C"),
        }
    else:
        start, shape = _resized_crop(view, sizes_B2, u)
        parameters = {"start": start, "shape": shape}
    if view.patch:
        parameters["resized"] = shown_sizes(view, sizes_B2, turns_B).astype(np.float32)
    if view.flip:
        parameters["mirror"] = (u[:, _FLIP] < view.flip).astype(np.int32)
    for index in range(view.operations):
        names_B, magnitudes_B = drawn_operations(view, u, index)
        named = operation_parameters(names_B, magnitudes_B, view.size)
        parameters |= {f"{name}{index}": values for name, values in named.items()}
    if view.colours == "linear" and (view.jitter or view.grayscale):
        _, factors_B4, applied_B = drawn_jitter(view, u)
        for name, factors_B in zip(STEPS[:3], factors_B4.T):
            parameters[name] = np.where(applied_B, factors_B, 1).astype(np.float32)
        parameters["hue"] = np.where(applied_B, 360 * view.hue * (2 * u[:, _HUE] - 1), 0).astype(np.float32)
        parameters["saturation"][u[:, _GRAY] < view.grayscale] = 0
    elif view.jitter:
        parameters |= jitter_parameters(view, *drawn_jitter(view, u))
    if view.colours != "linear" and view.grayscale:
        parameters["gray"] = (u[:, _GRAY] < view.grayscale).astype(np.int32)
    if view.blur:
        low, high = view.blur_sigma
        parameters["sigma"] = (low + (high - low) * u[:, _SIGMA]).astype(np.float32)
        parameters["window"] = np.where(u[:, _BLUR] < view.blur, 0, 1).astype(np.int32)
    if view.solarize:
        parameters["solarize_from"] = np.where(u[:, _SOLARIZE] < view.solarize, SOLARIZE_FROM, NEVER).astype(np.int32)
    return parameters


def drawn_jitter(view: Augmentation, uniforms_BU: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The colour jitter of each image: the order in which it takes `STEPS`, int64 [B, 4]; their factors, float64 [B, 4], the last
    one a share of the circle; and whether it is applied, bool [B].
    """
    u = uniforms_BU
    factors = []
    for name, column in zip(STEPS[:3], (_BRIGHTNESS, _CONTRAST, _SATURATION)):
        strength = getattr(view, name)
        low, high = max(0.0, 1 - strength), 1 + strength
        factors.append(low + (high - low) * u[:, column])
    factors.append(view.hue * (2 * u[:, _HUE] - 1))
    order_B4 = u[:, _TURN : _TURN + len(STEPS)].argsort(axis=1, kind="stable")
    return order_B4, np.stack(factors, 1), u[:, _JITTER] < view.jitter


def jitter_parameters(
    view: Augmentation, order_B4: np.ndarray, factors_B4: np.ndarray, applied_B: np.ndarray
) -> Mapping[str, np.ndarray]:
    """What the pipeline is given for torchvision's colour jitter. A step of no strength isn't taken, as there.

    Args:
        order_B4, factors_B4, applied_B: as `drawn_jitter` has them.

    Returns:
        factors: float32 [B, 4, 3], in four places: before a saturation that comes before the hue; before the hue; after it;
            after a saturation that comes after the hue. In each: brightness, then contrast, then brightness; 1 for none.
        saturates: int32 [B], UNSATURATED, BEFORE_HUE or AFTER_HUE.
        saturation: float32 [B], its factor.
        hue_steps: int32 [B], by how many of 256 steps the hue turns, from 0 to 255, 256 for no change; only where hue has a
            strength. It is cut off towards 0 from 255 steps to the circle, torchvision's reckoning with Pillow's images.
    """
    when_B4 = order_B4.argsort(axis=1)
    brightness_B, contrast_B, saturation_B, hue_B = when_B4.T
    early_B = saturation_B < hue_B
    places_B4 = 1 + (when_B4 > hue_B[:, None])
    if view.saturation:
        places_B4 = places_B4 - early_B[:, None] + (when_B4 > saturation_B[:, None])
    rows, line_B43 = np.arange(len(order_B4)), np.ones((len(order_B4), 4, 3), np.float32)
    line_B43[rows, places_B4[:, 0], np.where(brightness_B < contrast_B, 0, 2)] = factors_B4[:, 0]
    line_B43[rows, places_B4[:, 1], 1] = factors_B4[:, 1]
    line_B43[~applied_B] = 1
    saturates_B = np.where(early_B, BEFORE_HUE, AFTER_HUE)
    parameters = {
        "factors": line_B43,
        "saturates": np.where(applied_B & (view.saturation > 0), saturates_B, UNSATURATED).astype(np.int32),
        "saturation": factors_B4[:, 2].astype(np.float32),
    }
    if view.hue:
        steps_B = np.trunc(255 * factors_B4[:, 3]).astype(np.int32) % 256
        parameters["hue_steps"] = np.where(applied_B, steps_B, NEVER).astype(np.int32)
    return parameters


def drawn_operations(view: Augmentation, uniforms_BU: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The `index`-th operation of each image: its name, str [B], "" for none, and its magnitude, float64 [B] from 0 to 10,
    negative where an operation that has two directions takes the other one.
    """
    u = uniforms_BU[:, 5 * index :]  # the named columns are those of the first operation
    names_B = np.array(OPERATIONS)[(u[:, _CHOICE] * len(OPERATIONS)).astype(int)]
    names_B = np.where(u[:, _APPLY] < view.operation, names_B, "")
    normal_B = np.sqrt(-2 * np.log1p(-u[:, _NOISE])) * np.cos(2 * np.pi * u[:, _ANGLE])  # Box and Muller 1958
    magnitudes_B = np.clip(view.magnitude + view.magnitude_std * normal_B, 0, 10)
    return names_B, np.where(u[:, _SIGN] < 0.5, magnitudes_B, -magnitudes_B)


def operation_parameters(
    names_B: np.ndarray, magnitudes_B: np.ndarray, size: tuple[int, int]
) -> Mapping[str, np.ndarray]:
    """What the pipeline is given for one operation per image, with the ranges of timm's "inc1".

    Args:
        names_B: str, out of `OPERATIONS`, or "" for none.
        magnitudes_B: float64, -10 to 10.
        size: (height, width) of the view.

    Returns:
        kind: int32 [B], which branch: NOTHING, WARP and so on.
        matrix: float32 [B, 2, 3], from a place in the view to the place that its pixel comes from, both (x, y, 1) from the corner
            (rotations up to 30 degrees about the centre, shears up to 0.3, shifts up to 0.45 of the side).
        tones: uint8 [B, 4], (keep, start, flip, add): value & keep, then ^ flip where it is start or more, then + add where it is
            below 128 (posterize: 4 bits less one for every 2.5, but at least one, as newer Pillow demands; solarize: from 256
            down to 0; solarize-add: up to 110).
        blend: float32 [B, 3], (factor, grey, mean): factor * value + (1 - factor) * other, where other is grey * the pixel's
            grey + mean * the mean grey, or for sharpness the smoothed value; factors from 0.1 to 1.9.
    """
    signed_B = magnitudes_B / 10
    level_B = abs(signed_B)

    def at(name: str, values: np.ndarray | float, otherwise: float) -> np.ndarray:
        return np.where(names_B == name, values, otherwise)

    matrix_B23 = np.tile(np.eye(2, 3, dtype=np.float32), (len(names_B), 1, 1))
    centre_2 = np.array(size[::-1]) / 2
    turn_B = -np.deg2rad(at("rotate", 30 * signed_B, 0))
    rotation_B22 = np.stack([np.cos(turn_B), np.sin(turn_B), -np.sin(turn_B), np.cos(turn_B)], 1).reshape(-1, 2, 2)
    matrix_B23[:, :, :2] = rotation_B22
    matrix_B23[:, :, 2] = centre_2 - rotation_B22 @ centre_2
    for axis, letter in enumerate("xy"):
        matrix_B23[:, axis, 1 - axis] += at(f"shear-{letter}", 0.3 * signed_B, 0)
        matrix_B23[:, axis, 2] += at(f"translate-{letter}", 0.45 * size[1 - axis] * signed_B, 0)
    start_B = 256 - np.floor(at("solarize", level_B, 0) * 256)
    tones_B4 = [
        (0xFF << (4 + np.floor(at("posterize", np.minimum(level_B * 4, 3), -4)).astype(int))) & 0xFF,
        at("invert", 0, np.minimum(start_B, 255)),
        at("invert", 255, np.where(start_B < 256, 255, 0)),
        np.floor(at("solarize-add", level_B * 110, 0)),
    ]
    blended_B = np.isin(names_B, ("colour", "contrast", "brightness", "sharpness"))
    blend_B3 = [
        np.where(blended_B, np.maximum(0.1, 1 + 0.9 * signed_B), 1),
        at("colour", 1, 0),
        at("contrast", 1, 0),
    ]
    return {
        "kind": np.array([_KIND_OF.get(name, NOTHING) for name in names_B.tolist()], np.int32),
        "matrix": matrix_B23,
        "tones": np.stack(tones_B4, 1).astype(np.uint8),
        "blend": np.stack(blend_B3, 1).astype(np.float32),
    }


def _resized_crop(view: Augmentation, sizes_B2: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The crop of torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest centred one; or of BYOL's
    sampler: the first try, cut to the image; or one of the image's own shape, whose area alone is drawn."""
    sides_B2 = sizes_B2.astype(np.float64)
    own_B1 = sides_B2[:, :1] / sides_B2[:, 1:]
    (low, high), (narrow, wide) = view.scale, ((own_B1, own_B1) if view.patch else view.ratio)
    area_BT = sides_B2.prod(1, keepdims=True) * (low + (high - low) * u[:, _AREA])
    ratio_BT = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * u[:, _RATIO])
    tries_BT2 = np.round(np.sqrt(np.stack([area_BT * ratio_BT, area_BT / ratio_BT], -1)))
    if view.clip:
        tries_BT2 = np.clip(tries_BT2, 1, sides_B2[:, None])  # then the first one fits
    fits_BT = ((tries_BT2 > 0) & (tries_BT2 <= sides_B2[:, None])).all(-1)
    first_B = fits_BT.argmax(1)
    tried_B2 = np.take_along_axis(tries_BT2, first_B[:, None, None], 1)[:, 0]
    ratio_B1 = np.clip(own_B1, narrow, wide)
    bounded_B2 = np.concatenate([sides_B2[:, 1:] * ratio_B1, sides_B2[:, :1] / ratio_B1], -1)
    largest_B2 = np.maximum(np.round(np.minimum(sides_B2, bounded_B2)), 1)
    found_B1 = fits_BT.any(1)[:, None]
    shape_B2 = np.where(found_B1, tried_B2, largest_B2)
    room_B2 = sides_B2 - shape_B2
    start_B2 = np.where(found_B1, np.floor(u[:, (_LEFT, _TOP)] * (room_B2 + 1)), room_B2 // 2)
    return start_B2.astype(np.int32), shape_B2.astype(np.int32)

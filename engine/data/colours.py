"""torchvision's colour jitter of Pillow's images, as a DALI graph.

Values stay whole numbers all the way: on CPUs DALI makes bytes of floats slowly, while sums of bytes and tables cost little. So
blends are sums of sixteenths of a level, and hue goes through tables that know how Pillow counts it, in 256 steps of the circle.

Images are bytes, HWC; a plane is one channel of them.
"""

from collections.abc import Mapping

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from engine.data.augment import AFTER_HUE, BEFORE_HUE, NEVER
from engine.data.views import Augmentation

UNIT = 16  # parts of a level in which a blend is summed
INT16 = 2**15 - 1
CUT = -0.4999 / 255  # DALI rounds to the nearest byte where Pillow cuts off
SIXTH = 85  # of the circle is 42.5 of Pillow's 256 steps: counted in halves, steps and sixths are whole numbers


def jittered(pixels: DataNode, view: Augmentation, parameters: Mapping[str, DataNode], device: str) -> DataNode:
    """The colour jitter of each image, as `engine.data.augment.jitter_parameters` tells it.

    All orders are paths through one line of steps. Where an image does not take a step its factor is 1; saturation, which has two
    places in the line, and hue run for those images alone that take them there. The line is as short as can be: whenever a node
    has run, DALI's executor looks through all that are yet to run.
    """
    factors, saturates, saturation = (parameters[name] for name in ("factors", "saturates", "saturation"))
    if saturates == BEFORE_HUE:
        pixels = _saturate(_tone(pixels, factors, 0, device), saturation, view.saturation)
    pixels = _tone(pixels, factors, 1, device)
    if "hue_steps" in parameters:
        hue_steps = parameters["hue_steps"]
        if hue_steps < NEVER:
            pixels = _turn_hue(pixels, hue_steps, device)
    pixels = _tone(pixels, factors, 2, device)
    if saturates == AFTER_HUE:
        pixels = _tone(_saturate(pixels, saturation, view.saturation), factors, 3, device)
    return pixels


def without_colour(pixels: DataNode) -> DataNode:
    """All three channels show the grey."""
    return fn.color_space_conversion(_grey(pixels), image_type=types.GRAY, output_type=types.RGB)


def _grey(pixels: DataNode) -> DataNode:
    return fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)


def _tone(pixels: DataNode, factors: DataNode, place: int, device: str) -> DataNode:
    """Brightness, contrast about the mean grey, brightness: by the factors of this place."""
    before, contrast, after = (factors[place, step] for step in range(3))
    pixels = fn.brightness_contrast(pixels, brightness=before, brightness_shift=CUT)
    if device == "cpu":
        mean = fn.reductions.mean(_grey(pixels))
        pixels = fn.brightness_contrast(pixels, contrast=contrast, contrast_center=mean, brightness_shift=CUT)
    else:  # where the mean lies on the GPU it can be no argument
        mean = fn.reductions.mean(_grey(pixels), axes=(0, 1), keep_dims=True)
        contrast = contrast.gpu()
        levels = math.floor(pixels * contrast + (1 - contrast) * mean + 1e-4)
        pixels = fn.cast(math.clamp(levels, 0, 255), dtype=types.UINT8)
    return fn.brightness_contrast(pixels, brightness=after, brightness_shift=CUT)


def _saturate(pixels: DataNode, factor: DataNode, strength: float) -> DataNode:
    """factor * pixels + (1 - factor) * grey, cut off to bytes, for factors from 1 - strength to 1 + strength."""
    unit = min(UNIT, INT16 / 256 / (1 + 2 * strength))
    least = int(255 * unit * strength)  # how far below 0 a sum may lie
    own = {"brightness": factor * unit, "brightness_shift": least / INT16, "dtype": types.INT16}
    own_part = fn.brightness_contrast(pixels, **own)
    grey_part = fn.brightness_contrast(_grey(pixels), brightness=unit - factor * unit, dtype=types.INT16)
    sums = np.arange(least + int(255 * unit * (1 + strength)) + 2)
    return _looked_up(own_part + grey_part, ((sums - least) // unit).clip(0, 255))


def _turn_hue(pixels: DataNode, hue_steps: DataNode, device: str) -> DataNode:
    """By so many of 256 steps of the circle, in HSV as Pillow counts it; saturation is not cut off to its 256 steps."""
    planes = fn.transpose(pixels, perm=[2, 0, 1])
    red, green, blue = (fn.slice(planes, start=[channel], shape=[1], axes=[0]) for channel in range(3))
    less, more = math.min(red, green), math.max(red, green)
    value, middle, least = math.max(more, blue), math.max(less, math.min(more, blue)), math.min(less, blue)
    chroma = value - least
    part = _looked_up(chroma * _whole(256) + (middle - least), PARTS)
    falls = (red < green) * _whole(128) + (green < blue) * _whole(256) + (blue < red) * _whole(512)
    steps = fn.cast(hue_steps, dtype=types.UINT8)
    hue = _looked_up(falls + part, HUES) + (steps if device == "cpu" else steps.gpu())  # past 255 it begins again
    value, chroma, hue = (fn.reshape(plane, src_dims=[1, 2, 0], layout="HWC") for plane in (value, chroma, hue))
    channels = types.Constant(np.array([[[0, 256, 512]]], np.uint16), device=device)
    return value - _looked_up(chroma * _whole(SIXTH + 1) + _looked_up(hue + channels, SHADES), LOSSES)


def _whole(number: int) -> types.ScalarConstant:
    return types.Constant(number).uint16()


def _looked_up(indices: DataNode, table: np.ndarray) -> DataNode:
    """Of each index the table's byte."""
    return fn.lookup_table(
        indices, keys=list(range(len(table))), values=table.astype(float).tolist(), dtype=types.UINT8
    )


def _parts() -> np.ndarray:
    """At 256 * chroma + past: how far a hue lies past the last even sixth of the circle, or how far it is short of the next. In
    steps it is 42.5 * past / chroma, of which this is the sum of the whole numbers below and above."""
    chroma, past = np.mgrid[:256, :256]
    steps = SIXTH / 2 * np.minimum(past, chroma) / np.maximum(chroma, 1)
    return (np.floor(steps) + np.ceil(steps)).ravel()


def _hues() -> np.ndarray:
    """At 128 * falls + part: Pillow's hue. Bits of falls tell whether red is below green, green below blue, blue below red."""
    falls, part = np.mgrid[:8, :128]
    below, above = part // 2, (part + 1) // 2
    ways = {4: below, 5: 85 - above, 1: 85 + below, 3: 170 - above, 2: 170 + below, 6: 255 - above}
    return np.select([falls == bits for bits in ways], list(ways.values()), 0).ravel()


def _shades() -> np.ndarray:
    """At 256 * channel + hue: how many 85ths of the chroma the channel lies below the value."""
    place = (np.array([[5], [3], [1]]) * SIXTH + 2 * np.arange(256)) % (6 * SIXTH)
    return np.minimum(place, 4 * SIXTH - place).clip(0, SIXTH).ravel()


def _losses() -> np.ndarray:
    """At 86 * chroma + shade: by how many levels the channel lies below the value. A quarter of a level is what cutting off the
    saturation takes from the chroma on average."""
    chroma, shade = np.mgrid[:256, : SIXTH + 1]
    return np.round(np.maximum(chroma - 0.25, 0) * shade / SIXTH).ravel()


PARTS, HUES, SHADES, LOSSES = _parts(), _hues(), _shades(), _losses()

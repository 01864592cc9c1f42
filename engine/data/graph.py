"""The DALI graph that makes normalised views of encoded images, and the numbers that it is given for each image.

Wherever the encoded bytes come from, every accepted file becomes RGB: grey is repeated, palettes are looked up, CMYK is
converted, alpha is dropped, 16 bits are scaled to 8. EXIF orientation is ignored. Where one view is wanted only its crop is
decoded; more views are cut from one decoded image.

Shape suffixes: B images, 2 is (width, height) or (x, y).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from engine.data.augment import (
    AUTOCONTRAST,
    BLEND,
    EQUALIZE,
    NEVER,
    SHARPNESS,
    TONES,
    WARP,
    view_parameters,
    view_uniforms,
)
from engine.data.colours import jittered, without_colour
from engine.data.shapes import turns
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation

EVAL_MARGIN = 256 / 224  # the resized short side over the centre crop
SMALL = 64  # pixels; up to this an evaluated image is resized straight to the wanted size
FILL = np.array([round(255 * value) for value in IMAGENET_MEAN], np.uint8).reshape(1, 1, 3)
INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13

Inputs = Mapping[str, np.ndarray]  # by name, one row per image
# encoded images, their inputs, the decoder ("cpu" or "mixed") -> normalised fp32 images, CHW, for each view
Graph = Callable[[DataNode, Mapping[str, DataNode], str], tuple[DataNode, ...]]


def with_header(encoded: DataNode) -> DataNode:
    """The same bytes, of which no decoder hears before the headers of the whole batch were read. Else DALI 2.4 ends the process
    (SIGSEGV) where a batch has images and something that is none; so it is an error like others.
    """
    nothing = 0 * fn.cast(fn.peek_image_shape(encoded)[0], dtype=types.INT32)
    return fn.reinterpret(encoded, shape=fn.stack(fn.cast(encoded.shape()[0], dtype=types.INT32) + nothing))


def decode(encoded: DataNode, decoder: str) -> DataNode:
    """The whole image, uint8 RGB, HWC."""
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, adjust_orientation=False)


def branches(views: Sequence[Augmentation]) -> bool:
    """Whether the graph of these views has an `if` about a node (colours as torchvision's everywhere, others on CPUs)."""
    return any(view.operations or view.jitter or view.grayscale or view.blur or view.solarize for view in views)


def view_inputs(views: Sequence[Augmentation], sizes_B2: np.ndarray, rows: slice, seed: int, step: int) -> Inputs:
    """What the graph of these views wants for these rows of a step."""
    inputs = {}
    for index, view in enumerate(views):
        drawn = view_uniforms(rows, seed, step, index)
        parameters = view_parameters(view, sizes_B2, drawn, turns(view, rows, seed, step, index))
        inputs |= {f"{index}.{key}": value for key, value in parameters.items()}
    return inputs


def view_graph(
    views: Sequence[Augmentation], encoded: DataNode, given: Mapping[str, DataNode], decoder: str
) -> tuple[DataNode, ...]:
    """A `Graph`, but for the views: each image's, as `view_inputs` has drawn them."""
    image = decode(encoded, decoder) if len(views) > 1 else None
    outputs = []
    for index, view in enumerate(views):
        parameters = {key.split(".")[1]: node for key, node in given.items() if key.startswith(f"{index}.")}
        crop = {key: parameters[key] for key in ("start", "shape")}
        if image is None:
            pixels = fn.decoders.image_slice(
                encoded, **crop, axis_names="WH", device=decoder, output_type=types.RGB, adjust_orientation=False
            )
        else:
            pixels = fn.slice(image, **crop, axis_names="WH")
        size = parameters.get("resized", view.size)
        pixels = fn.resize(pixels, size=size, interp_type=INTERPOLATIONS[view.resize], antialias=True)
        if "shift" in parameters:
            window = {"start": parameters["shift"], "shape": view.size[::-1], "axis_names": "WH"}
            pixels = fn.slice(pixels, **window, out_of_bounds_policy="pad", fill_values=0)
        for number in range(view.operations):
            operation = [parameters[f"{name}{number}"] for name in ("kind", "matrix", "tones", "blend")]
            pixels = _operate(pixels, view.size, *operation, decoder)
        pixels = _change_colours(pixels, view, parameters, decoder)
        shown = _normalise(pixels, view.std, mirror=parameters.get("mirror", 0))
        outputs.append(_in_room(shown, view.size) if view.patch else shown)
    return tuple(outputs)


def _change_colours(pixels: DataNode, view: Augmentation, parameters: Mapping[str, DataNode], decoder: str) -> DataNode:
    """Jitter, blur and solarisation; on CPUs of the images alone that they change. On GPUs blur, solarisation and linear colours
    are of whole batches, which are not split for kernels as short as these. The pixels are the same."""
    on_cpu = decoder == "cpu"
    if "factors" in parameters:
        pixels = jittered(pixels, view, parameters, "cpu" if on_cpu else "gpu")
    if "gray" in parameters:
        drops = parameters["gray"] == 1
        if drops:
            pixels = without_colour(pixels)
    if "hue" in parameters:
        colours = {key: parameters[key] for key in ("brightness", "contrast", "saturation", "hue")}
        changes = _changes(**colours) if on_cpu else True
        if changes:
            pixels = fn.color_twist(pixels, **colours)
    if "sigma" in parameters:
        sigma, window = parameters["sigma"], parameters["window"]
        changes = window == 0 if on_cpu else True
        if changes:
            pixels = fn.gaussian_blur(pixels, sigma=sigma, window_size=window)
    if "solarize_from" in parameters:
        start = parameters["solarize_from"] if on_cpu else parameters["solarize_from"].gpu()
        changes = start < NEVER if on_cpu else True
        if changes:
            pixels = pixels ^ ((pixels >= start) * types.Constant(255).uint8())  # 255 - value, where it is bright
    return pixels


def _changes(brightness: DataNode, contrast: DataNode, saturation: DataNode, hue: DataNode) -> DataNode:
    return (brightness != 1) | (contrast != 1) | (saturation != 1) | (hue != 0)


def _operate(
    pixels: DataNode,
    size: tuple[int, int],
    kind: DataNode,
    matrix: DataNode,
    tones: DataNode,
    blend: DataNode,
    decoder: str,
) -> DataNode:
    """One operation of RandAugment, the one of each image alone. Rounding is Pillow's: blends cut off."""
    device = "cpu" if decoder == "cpu" else "gpu"
    if kind == WARP:
        pixels = _warp(pixels, size, matrix, device)
    elif kind == TONES:
        pixels = _change_tones(pixels, tones if device == "cpu" else tones.gpu())
    elif kind == BLEND:
        numbers = blend if device == "cpu" else blend.gpu()
        grey = fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)
        mean = math.floor(fn.reductions.mean(grey, axes=(0, 1), keep_dims=True) + 0.5)
        pixels = _cut(pixels * numbers[0] + (1 - numbers[0]) * (numbers[1] * grey + numbers[2] * mean))
    elif kind == SHARPNESS:
        numbers = blend if device == "cpu" else blend.gpu()
        smooth = fn.filter(pixels, types.Constant(SMOOTH, device=device))
        within = types.Constant(
            np.pad(np.ones((size[0] - 2, size[1] - 2, 1), np.float32), ((1, 1), (1, 1), (0, 0))), device=device
        )
        pixels = _cut(pixels + (1 - numbers[0]) * within * (fn.cast(smooth, dtype=types.FLOAT) - pixels))
    elif kind == AUTOCONTRAST:
        low = fn.reductions.min(pixels, axes=(0, 1), keep_dims=True)
        high = fn.reductions.max(pixels, axes=(0, 1), keep_dims=True)
        flat = low == high  # such a channel stays as it is
        reach = fn.cast(high, dtype=types.FLOAT) - low + 255 * flat
        pixels = _cut((fn.cast(pixels, dtype=types.FLOAT) - low * (low != high)) * (255 / reach))
    elif kind == EQUALIZE:
        pixels = fn.equalize(pixels)
    return pixels


def _warp(pixels: DataNode, size: tuple[int, int], matrix: DataNode, device: str) -> DataNode:
    """Bilinear; what comes from outside the image is the mean colour, with a sharp edge as in Pillow."""
    warped = fn.warp_affine(pixels, matrix=matrix, interp_type=types.INTERP_LINEAR)
    rows_columns = np.mgrid[: size[0], : size[1]].astype(np.float32)[..., None] + 0.5
    y, x = (types.Constant(places, device=device) for places in rows_columns)
    m = matrix if device == "cpu" else matrix.gpu()
    source_x, source_y = (m[axis, 0] * x + m[axis, 1] * y + m[axis, 2] for axis in (0, 1))
    inside = (source_x >= 0) & (source_x < size[1]) & (source_y >= 0) & (source_y < size[0])
    return warped * inside + types.Constant(FILL, device=device) * (inside ^ True)


def _change_tones(pixels: DataNode, tones: DataNode) -> DataNode:
    pixels = pixels & tones[0]
    pixels = pixels ^ ((pixels >= tones[1]) * tones[2])
    return pixels + (pixels < 128) * tones[3]


def _cut(values: DataNode) -> DataNode:
    """Floats to bytes, cut off to whole numbers from 0 to 255."""
    return fn.cast(math.clamp(math.floor(values), 0, 255), dtype=types.UINT8)


def centre_inputs(sizes_B2: np.ndarray, size: tuple[int, int], squeeze: bool = False) -> Inputs:
    """The resized (height, width) float32 [B, 2] of each image, and where its centre crop lies: left, top in [0, 1].

    With `squeeze`, or up to 64 pixels, the crop is the whole of what was resized.
    """
    target_2 = np.array(size[::-1])
    if squeeze or max(size) <= SMALL:
        resized_B2 = np.broadcast_to(target_2, sizes_B2.shape)
    else:
        cover_2 = np.round(target_2 * EVAL_MARGIN)
        scale_B1 = (cover_2 / sizes_B2).max(1, keepdims=True)
        resized_B2 = np.maximum(np.floor(sizes_B2 * scale_B1 + 1e-6), cover_2)
    room_B2 = resized_B2 - target_2
    place_B2 = np.round(room_B2 / 2) / np.maximum(room_B2, 1)
    columns = {"resized": resized_B2[:, ::-1], "left": place_B2[:, 0], "top": place_B2[:, 1]}
    return {name: np.ascontiguousarray(column, np.float32) for name, column in columns.items()}


def centre_graph(
    size: tuple[int, int], resize: str, encoded: DataNode, given: Mapping[str, DataNode], decoder: str
) -> tuple[DataNode, ...]:
    """A `Graph`, but for (height, width) and filter: the centre crop of each image, as `centre_inputs` places it."""
    how = {"interp_type": INTERPOLATIONS[resize], "antialias": True}
    image = fn.resize(decode(encoded, decoder), size=given["resized"], **how)
    return (_normalise(image, IMAGENET_STD, crop=size, crop_pos_x=given["left"], crop_pos_y=given["top"]),)


def _in_room(shown: DataNode, size: tuple[int, int]) -> DataNode:
    """Images CHW of any shape in memory for one of (height, width): each one's values back to back, then zeros."""
    room = [3, *size]
    return fn.reshape(
        fn.pad(fn.reshape(shown, shape=[-1]), axes=[0], shape=[int(np.prod(room))]), shape=room, layout="CHW"
    )


def _normalise(pixels: DataNode, deviation: Sequence[float], **crop: DataNode | tuple[int, int] | int) -> DataNode:
    mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, deviation))
    return fn.crop_mirror_normalize(pixels, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW", **crop)

"""Objects of an image beside its patch features: what judging patches without training works on.

Masks stay at the resolution they were annotated at. An input shows all of an image, or its centre square; `Window` says which
pixels, and patches are compared with masks by the area they share.

Shapes: H x W annotated pixels in sight, h x w patches, n objects, C width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.data import ahead
from engine.data.annotated import dense
from engine.data.annotated.dense import Frame
from engine.data.annotated.objects import VOID, ObjectSet
from engine.evals.subject import LAYERS, Subject

PUBLISHED_SIDE = 224  # a set whose images are smaller is not enlarged to it
DIGITS = 6  # of cosines; beyond, fp32 features hold rounding only


@dataclass(frozen=True, eq=False)
class Shown:
    """An image as an input shows it.

    Attributes:
        index: of the image in its set.
        pixels: uint8 [3, height, width], the input.
        masks: bool [n, H, W], of every object of the image in sight, without ignored pixels.
        ignored: bool [H, W], pixels that don't count: of crowds and of difficult objects, borders between objects.
        maps: by layer, fp32 [h, w, C] on the CPU.
    """

    index: int
    pixels: Tensor
    masks: np.ndarray
    ignored: np.ndarray
    maps: dict[str, Tensor]


def frame(text: str, patch: int) -> Frame:
    """What "crop:224", "short:480" or "square:512" names. Raises BadInput for other texts, or no multiple of the patch."""
    mode, _, size = text.partition(":")
    if mode not in ("crop", "short", "square") or not size.isdecimal():
        raise BadInput(f"input {text!r} is not MODE:PIXELS with MODE one of crop, short, square, such as crop:224.")
    return Frame(int(size), mode, patch)


def check_inputs(inputs: Sequence[str], layers: Sequence[str]) -> None:
    """Raises BadInput for an input that `frame` does not know, a layer that `Subject.maps` does not, none, or one twice."""
    for text in inputs:
        frame(text, 1)
    if not layers or not set(layers) <= set(LAYERS):
        raise BadInput(f"layers are {' '.join(layers) or 'missing'}; choose from {', '.join(LAYERS)}.")
    for named in (inputs, layers):
        if len(set(named)) < len(named):
            raise BadInput(f"{' '.join(named)} names one twice.")


def check_objects(protocol: str, objects: ObjectSet, which: str) -> None:
    """Raises BadInput for a set without an object that counts, or with a mask that is missing or of another size."""
    if not any((~each.ignored).any() for each in objects.objects):
        raise BadInput(f"protocol {protocol}: the {which} set has no object that counts, in {len(objects)} images.")
    objects.check_masks()


def check_model(subject: Subject, objects: ObjectSet, inputs: Sequence[str]) -> None:
    """Raises BadInput for weights that do not take these inputs."""
    for text in inputs:
        how = frame(text, subject.vit.patch_size)
        for width, height in np.unique(objects.images.sizes, axis=0).tolist():
            subject.check_input(*how.shape(height, width))


def short_side(objects: ObjectSet) -> int:
    """Of the set's images, in the median."""
    return int(np.median(objects.images.sizes.min(1)))


def nearest_multiple(side: float, patch: int) -> int:
    """Of the patch size, one patch at least."""
    return patch * max(1, round(side / patch))


def default_inputs(objects: ObjectSet, patch: int, enlarged: float = 1.0) -> tuple[str, ...]:
    """What suits the set: the published inputs, or small images as they are, or `enlarged`; in multiples of the patch size."""
    side = short_side(objects)
    if side < PUBLISHED_SIDE:
        return (f"crop:{nearest_multiple(side * enlarged, patch)}",)
    return tuple(f"{mode}:{nearest_multiple(size, patch)}" for mode, size in (("crop", 224), ("short", 480)))


def window(how: Frame, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of an image of H x W pixels that its input shows, to the nearest pixel."""
    if how.mode != "crop":
        return slice(0, height), slice(0, width)
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return slice(top, top + side), slice(left, left + side)


def shown(
    subject: Subject, objects: ObjectSet, indices: Sequence[int], how: Frame, layers: Sequence[str]
) -> Iterator[Shown]:
    """Each of these images with its masks and the features of each layer; images and masks are read in threads.

    Raises:
        BadInput: an image or a mask cannot be read, the weights are no ViT that takes inputs of this size, or a feature is NaN
            or infinite.
    """

    def read(index: int) -> Shown:
        pixels = dense.read(objects.images, index)
        rows, columns = window(how, *pixels.shape[-2:])
        masks, left_out = objects.masks(index), objects.objects[index].ignored
        ignored = (objects.semantic(index) == VOID) | masks[left_out].any(0)
        ignored &= ~masks[~left_out].any(0)
        masks, ignored = masks[:, rows, columns], ignored[rows, columns]
        return Shown(index, how.image(pixels), masks, ignored, {})

    for each in ahead.loaded(read, indices, subject.threads):
        input_13HW = dense.normalised(each.pixels)[None]
        maps = subject.maps_by_layer(input_13HW, layers)
        each.maps.update({layer: map_1hwC[0].cpu() for layer, map_1hwC in maps.items()})
        if not all(torch.isfinite(map_hwC).all() for map_hwC in each.maps.values()):
            raise BadInput(f"features of {subject.name} contain NaN or infinity: these weights cannot be evaluated.")
        yield each


def directions(map_hwC: Tensor) -> Tensor:
    """float64 [h, w, C], each patch's feature at length one, so that products are cosines; zero stays zero."""
    return torch.nn.functional.normalize(map_hwC.double(), dim=-1)


def cosines(one: Tensor, other: Tensor) -> np.ndarray:
    """float64 [...]: products of `directions` [..., C], rounded to DIGITS."""
    return (one.double() * other.double()).sum(-1).numpy().clip(-1, 1).round(DIGITS)


def shares(masks_nHW: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """float64 [n, h, w]: the share of each patch's area that a mask covers, pixels and patches being exact rectangles."""
    height, width = masks_nHW.shape[-2:]
    down_hH, across_wW = _overlaps(grid[0], height), _overlaps(grid[1], width)
    return down_hH @ masks_nHW.astype(np.float64) @ across_wW.T


def patch_of(pixels: np.ndarray, shape: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """int64 [..., 2]: row and column of the patch that holds the centre of each pixel [..., 2] of H x W."""
    return ((2 * pixels + 1) * np.array(grid)) // (2 * np.array(shape))


def _overlaps(cells: int, pixels: int) -> np.ndarray:
    """float64 [cells, pixels]: the share of each of so many equal cells of a line that each pixel of the line fills."""
    edges = np.arange(cells + 1) * pixels / cells
    from_, to = np.arange(pixels), np.arange(1, pixels + 1)
    common = np.minimum(edges[1:, None], to) - np.maximum(edges[:-1, None], from_)
    return common.clip(0) * cells / pixels

"""Frozen patch features with a class each, and classes of patches judged at the pixels: segmentation without training a network.

An input shows the whole image, squeezed to a square, so every pixel lies in one patch and gets the class of that patch; masks are
judged at the resolution they were annotated at. One batch of maps is in memory at a time, and the patches that were asked for.

Shapes: n images, m patches, K classes, h x w patches of an image, H x W its pixels, P patch size, B batch, C width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.data import ahead
from engine.data.annotated import dense
from engine.data.annotated.dense import Frame
from engine.data.annotated.objects import VOID, SemanticSet
from engine.evals import patches
from engine.evals.metrics.confusion import SegmentationCounts
from engine.evals.subject import Subject

Predict = Callable[[Tensor], Tensor]  # features fp32 [m, C] -> labels int64 [m]


def frame(protocol: str, images: SemanticSet, size: int, patch_size: int) -> Frame:
    """The square of `size` pixels; 0 takes the multiple of the patch size that is nearest to 224, or to the short side of the
    set's images where that is less. Raises BadInput for a size that is no multiple."""
    if not size:
        size = patches.nearest_multiple(min(patches.PUBLISHED_SIDE, patches.short_side(images)), patch_size)
    if size % patch_size:
        raise BadInput(f"protocol {protocol}: size = {size} is no multiple of the patch size {patch_size}; choose one.")
    return Frame(size, "square", patch_size)


def majority(labels_HW: np.ndarray, how: Frame, void: bool = True) -> np.ndarray:
    """The label that most pixels of each patch have, uint8 [h, w]; a tie goes to the lower one.

    Args:
        labels_HW: uint8.
        how: the input; labels are resized to it first, by the nearest pixel.
        void: whether 255 is a label like others; if not, a patch is 255 only where it has nothing else.
    """
    sized = how.masks(torch.from_numpy(labels_HW)).numpy()
    side = how.multiple
    grid = sized.shape[0] // side, sized.shape[1] // side
    patch_of = np.arange(grid[0]).repeat(side)[:, None] * grid[1] + np.arange(grid[1]).repeat(side)
    counts = np.bincount((patch_of * 256 + sized).ravel(), minlength=256 * grid[0] * grid[1]).reshape(-1, 256)
    if not void:
        counts[:, VOID] = counts[:, :VOID].sum(1) == 0
    return counts.argmax(1).astype(np.uint8).reshape(grid)


def labels(images: SemanticSet, how: Frame, threads: int | None = None) -> np.ndarray:
    """The majority labels of all images, uint8 [n, h, w]. Raises BadInput for a mask that cannot be read."""
    read = ahead.loaded(lambda index: majority(images.semantic(index), how), range(len(images)), threads)
    return np.stack(list(read))


def drawn(usable_nhw: np.ndarray, most: int, seed: int) -> np.ndarray:
    """bool [n, h, w]: `most` of the usable patches, a pure function of the arguments; all of them for 0 or if there are less."""
    places = np.flatnonzero(usable_nhw)
    if 0 < most < len(places):
        # RandomState, whose stream numpy has frozen
        places = np.random.RandomState(seed).permutation(places)[:most]
    chosen = np.zeros(usable_nhw.size, bool)
    chosen[places] = True
    return chosen.reshape(usable_nhw.shape)


def features(subject: Subject, images: SemanticSet, how: Frame, chosen_nhw: np.ndarray) -> Tensor:
    """fp32 [m, C] on the device: the chosen patches, in order of images and within them; images without one are not encoded.

    Raises:
        BadInput: an image cannot be read, or the weights are no ViT that takes inputs of this size.
    """
    indices = np.flatnonzero(chosen_nhw.any((1, 2))).tolist()
    found = []
    for ids, _, maps_BhwC in encoded(subject, images, indices, how):
        found.append(maps_BhwC[torch.from_numpy(chosen_nhw[ids]).to(maps_BhwC.device)])
    return torch.cat(found)


def judged(
    subject: Subject, images: SemanticSet, how: Frame, predictors: Mapping[str, Predict]
) -> tuple[dict[str, SegmentationCounts], SegmentationCounts]:
    """Every pixel of a set, judged by each of the predictors in one pass.

    Returns:
        the counts by predictor, and those of the grid itself, each patch as its true majority: what can be had at this size.

    Raises:
        BadInput: as `features`, or a mask cannot be read.
    """
    classes = len(images.semantic_classes)
    counts = {name: SegmentationCounts(classes) for name in predictors}
    grid = SegmentationCounts(classes)
    for _, truths, maps_BhwC in encoded(subject, images, range(len(images)), how, with_truth=True):
        for truth_HW in truths:
            best_hw = majority(truth_HW, how, void=False)
            grid.add(truth_HW, at_pixels(np.where(best_hw == VOID, 0, best_hw), truth_HW.shape))
        for name, predict in predictors.items():
            for truth_HW, found_hw in zip(truths, predicted(predict, maps_BhwC), strict=True):
                counts[name].add(truth_HW, at_pixels(found_hw, truth_HW.shape))
    return counts, grid


def encoded(
    subject: Subject, images: SemanticSet, indices: Sequence[int], how: Frame, with_truth: bool = False
) -> Iterator[tuple[list[int], list[np.ndarray], Tensor]]:
    """Batch by batch: ids, masks uint8 [H, W] where they are asked for, maps fp32 [B, h, w, C] on the device."""

    def read(index: int) -> tuple[Tensor, np.ndarray | None]:
        return how.image(dense.read(images.images, index)), images.semantic(index) if with_truth else None

    loaded = zip(indices, ahead.loaded(read, indices, subject.threads), strict=True)
    while batch := list(islice(loaded, subject.batch_size)):
        ids, pairs = zip(*batch)
        pixels, truths = zip(*pairs)
        yield list(ids), list(truths), subject.maps(dense.normalised(torch.stack(pixels)))


def predicted(predict: Predict, maps_BhwC: Tensor) -> np.ndarray:
    """uint8 [B, h, w]."""
    found = predict(maps_BhwC.flatten(0, 2))
    return found.view(maps_BhwC.shape[:3]).to(torch.uint8).cpu().numpy()


def at_pixels(labels_hw: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W]: each pixel as the patch that holds its centre."""
    rows, columns = (
        (2 * np.arange(side) + 1) * cells // (2 * side) for side, cells in zip(shape, labels_hw.shape, strict=True)
    )
    return labels_hw[rows][:, columns]

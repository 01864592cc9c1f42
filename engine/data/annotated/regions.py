"""Objects that one image of ids tells apart, whatever it was made for: classes of pixels, objects of a frame of a video.

What is judged object by object is then judged on ADE20K, VOC's semantic masks and DAVIS too.

Shape suffixes: N images, n objects in one image, K categories, H x W pixels of one image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.data.ahead import loaded
from engine.data.annotated.objects import BACKGROUND, VOID, Objects, ObjectSet, SemanticSet
from engine.data.sources import ImageSet

Ids = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Regions(ObjectSet):
    """As ObjectSet; an image has one object for each id that it shows, in the order of ids.

    Attributes:
        ids: of the image at a place, uint8 [H, W]: 0 no object, 255 not to be counted, else an object's id.
        shown: N, uint8 [n], the ids of each image's objects.
    """

    ids: Ids
    shown: tuple[np.ndarray, ...]

    def check_masks(self) -> None:
        """Nothing is left to find: `of_ids` has read every mask."""

    def masks(self, index: int) -> np.ndarray:
        """bool [n, H, W]; raises BadInput as `ids`."""
        return self.ids(index) == self.shown[index][:, None, None]

    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W], 0 where no object is, k + 1 for category k, 255 not to be counted; raises BadInput as `ids`."""
        class_of = np.zeros(VOID + 1, np.uint8)
        class_of[VOID], class_of[self.shown[index]] = VOID, self.objects[index].labels + 1
        return class_of[self.ids(index)]


def of_ids(
    images: ImageSet, categories: Sequence[str], ids: Ids, label_of: np.ndarray, threads: int | None = None
) -> Regions:
    """Reads the ids of every image to learn what it shows.

    Args:
        categories: K names.
        ids: as `Regions` has it.
        label_of: int64 [256], the place in the categories of each id that may occur.

    Raises:
        BadInput: as `ids`.
    """
    shown, objects = zip(
        *loaded(lambda index: _objects(ids(index), label_of), range(len(images)), threads), strict=True
    )
    targets = np.zeros((len(objects), len(categories)), np.int8)
    for row, each in enumerate(objects):
        targets[row, each.labels] = 1
    return Regions(images, tuple(categories), objects, targets, ids, shown)


def of_classes(source: SemanticSet, threads: int | None = None) -> Regions:
    """Each class that an image shows, as one object; the background is none. Raises BadInput as the source's `semantic`."""
    has_background = source.semantic_classes[0] == BACKGROUND
    categories = source.semantic_classes[1 if has_background else 0 :]
    ids = source.semantic if has_background else partial(_from_one, source)
    return of_ids(source.images, categories, ids, np.arange(VOID + 1) - 1, threads)


def _from_one(source: SemanticSet, index: int) -> np.ndarray:
    """The semantic mask of an image with its classes from 1 on."""
    semantic_HW = source.semantic(index)
    return np.where(semantic_HW == VOID, semantic_HW, semantic_HW + 1)


def _objects(ids_HW: np.ndarray, label_of: np.ndarray) -> tuple[np.ndarray, Objects]:
    """The ids that are there, and their objects."""
    shown = np.setdiff1d(ids_HW, (0, VOID))
    rows = []
    for value in shown:
        mask_HW = ids_HW == value
        (y0, y1), (x0, x1) = (np.flatnonzero(mask_HW.any(axis))[[0, -1]] for axis in (1, 0))
        rows.append(((x0, y0, x1 + 1, y1 + 1), int(label_of[value]), float(mask_HW.sum()), False))
    return shown, Objects.of_rows(rows)

"""Classes of pixels as objects: what is judged object by object is then judged on ADE20K and on VOC's semantic masks too.

Shape suffixes: K categories, H x W pixels of one image.
"""

from dataclasses import dataclass

import numpy as np

from engine.data.dense import loaded
from engine.data.objects import BACKGROUND, VOID, Objects, ObjectSet, SemanticSet


@dataclass(frozen=True)
class Regions(ObjectSet):
    """As ObjectSet; an image has one object of each class that it shows, in the order of classes. The background is none.

    Attributes:
        source: the set with semantic masks.
    """

    source: SemanticSet

    def check_masks(self) -> None:
        """Nothing is left to find: `of_classes` has read every mask."""

    def masks(self, index: int) -> np.ndarray:
        """bool [n, H, W]; raises BadInput as the source's `semantic`."""
        return self.semantic(index) == (self.objects[index].labels + 1)[:, None, None]

    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W], 0 background (in sets that have one), k + 1 for category k, 255 not to be counted."""
        return _from_one(self.source, index)


def of_classes(source: SemanticSet, threads: int | None = None) -> Regions:
    """Reads every mask of a set to learn which classes each image shows. Raises BadInput as its `semantic`."""
    categories = tuple(source.semantic_classes)[1 if _has_background(source) else 0 :]
    objects = tuple(loaded(lambda index: _objects(_from_one(source, index)), range(len(source)), threads))
    targets = np.zeros((len(objects), len(categories)), np.int8)
    for row, each in enumerate(objects):
        targets[row, each.labels] = 1
    return Regions(source.images, categories, objects, targets, source)


def _has_background(source: SemanticSet) -> bool:
    return source.semantic_classes[0] == BACKGROUND


def _from_one(source: SemanticSet, index: int) -> np.ndarray:
    """The semantic mask of an image with its classes from 1 on."""
    semantic_HW = source.semantic(index)
    return semantic_HW if _has_background(source) else np.where(semantic_HW == VOID, semantic_HW, semantic_HW + 1)


def _objects(semantic_HW: np.ndarray) -> Objects:
    rows = []
    for value in np.flatnonzero(np.bincount(semantic_HW.ravel(), minlength=VOID + 1)[1:VOID]) + 1:
        mask_HW = semantic_HW == value
        (y0, y1), (x0, x1) = (np.flatnonzero(mask_HW.any(axis))[[0, -1]] for axis in (1, 0))
        rows.append(((x0, y0, x1 + 1, y1 + 1), int(value) - 1, float(mask_HW.sum()), False))
    return Objects.of_rows(rows)

"""Images with objects in them, as the readers of COCO's and VOC's layouts give them: boxes, classes, masks.

Boxes are (x0, y0, x1, y1) in pixels from the upper left corner of the image; x1 - x0 is the width, so the box of the
whole image is (0, 0, W, H). Shape suffixes: N images, n objects in one image, K categories, H x W pixels of one image.
"""

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.core.errors import BadInput
from engine.data import sources
from engine.data.listing import File, Listing
from engine.data.sources import ImageSet
from engine.data.subsets import subset

VOID = 255  # in semantic masks, where 0 is the background and k + 1 the category k
BACKGROUND = "background"
MOST_CATEGORIES = VOID - 1
BEYOND = 1.0  # pixels that a box may reach beyond its image, as published ones do by rounding; it is clipped


@dataclass(frozen=True)
class Objects:
    """The n objects of one image; n may be 0.

    Attributes:
        boxes: float32 [n, 4].
        labels: int64 [n], places in the set's categories.
        areas: float32 [n], in pixels: of the object where the set says that (COCO), else of its box.
        ignored: bool [n], objects that count neither as found nor as missed: COCO's crowds, VOC's difficult ones.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[Sequence[float], int, float, bool]]) -> "Objects":
        """From (box, label, area, ignored) of each object."""
        boxes, labels, areas, ignored = zip(*rows) if rows else ((), (), (), ())
        return cls(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(areas, np.float32),
            np.array(ignored, bool),
        )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ObjectSet(ABC):
    """N readable images with their objects. Images that cannot be read are left out; `images.bad` says which.

    Attributes:
        images: in the order of the set's list; without labels.
        categories: K names.
        objects: N, of each image.
        targets: int8 [N, K], 1 where the image shows the category, 0 where it does not, -1 where it is not to be counted.
    """

    images: ImageSet
    categories: tuple[str, ...]
    objects: tuple[Objects, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def semantic_classes(self) -> tuple[str, ...]:
        """Names of the labels that `semantic` gives."""
        return BACKGROUND, *self.categories

    @property
    def unused(self) -> tuple[str, ...]:
        """The categories that no object of the set has."""
        used = np.zeros(len(self.categories), bool)
        for objects in self.objects:
            used[objects.labels] = True
        return tuple(name for name, is_used in zip(self.categories, used, strict=True) if not is_used)

    @abstractmethod
    def check_masks(self) -> None:
        """Raises BadInput for a mask that is missing or of another size, as far as that shows without decoding it."""

    @abstractmethod
    def masks(self, index: int) -> np.ndarray:
        """bool [n, H, W] of one image, in the order of its objects. Raises BadInput where there are none or damaged ones."""

    @abstractmethod
    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W] of one image: 0 background, k + 1 for category k, 255 not to be counted. Raises BadInput as masks."""


class SemanticSet(Protocol):
    """N readable images with a class for every pixel; an ObjectSet is one.

    Attributes:
        images: without labels.
        semantic_classes: K names.
    """

    images: ImageSet
    semantic_classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W] of one image, 0 to K - 1, 255 not to be counted. Raises BadInput where there is none or a damaged one."""


def readable(
    root: Path, paths: Sequence[str], split: str, source: Path, bad_limit: float, screening: str
) -> tuple[ImageSet, np.ndarray]:
    """Screens the images `paths` below `root`, which the file `source` lists.

    Returns:
        the set of those that can be read, and their places in `paths`, int64 [N].

    Raises:
        BadInput: no image, one listed twice, a file that is missing, or too many bad ones.
    """
    if not paths:
        raise BadInput(f"{source} lists no images")
    if len(set(paths)) < len(paths):
        twice = next(path for place, path in enumerate(paths) if path in paths[:place])
        raise BadInput(f"{source} lists the image {twice} twice")
    files = []
    for path in paths:
        try:
            status = os.stat(root / path)
        except OSError as error:
            raise BadInput(f"{source} lists {path}, which is missing in {root} ({error.strerror})") from error
        except ValueError as error:
            raise BadInput(f"{source} lists {path!r}, which is no name of a file") from error
        files.append(File(path, status.st_size, status.st_mtime_ns))
    images = sources.of_listing(Listing.of(root, files), split, bad_limit, screening)
    kept = np.flatnonzero(images.good)
    return dataclasses.replace(subset(images, kept), bad=images.bad), kept


def fitted(
    box: tuple[float, float, float, float], width: int, height: int, entry: str
) -> tuple[float, float, float, float]:
    """The box within its image; what reaches up to a pixel beyond is clipped.

    Raises:
        BadInput: no finite box, one whose sides are swapped, or one that lies outside; `entry` names it.
    """
    x0, y0, x1, y1 = box
    if not (x0 <= x1 and y0 <= y1):
        raise BadInput(f"{entry} has the box {_shown(box)}, whose right or lower side comes before the other one")
    if not (x0 >= -BEYOND and y0 >= -BEYOND and x1 <= width + BEYOND and y1 <= height + BEYOND):
        raise BadInput(f"{entry} has the box {_shown(box)} outside its image of {width}x{height} pixels")
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def check_categories(categories: Sequence[str], source: Path) -> None:
    """Raises BadInput if there are none, or one twice."""
    if not categories:
        raise BadInput(f"{source} has no categories")
    if len(set(categories)) < len(categories):
        twice = next(name for place, name in enumerate(categories) if name in categories[:place])
        raise BadInput(f"{source} has the category {twice!r} twice")


def _shown(box: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"

"""Masks kept as images of indices, a PNG file per photograph: how one is read, and sets that are a folder of each.

Shape suffixes: N images, K classes, H x W pixels of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from engine.core.errors import BadInput
from engine.data.annotated.objects import check_categories, readable
from engine.data.listing import walk
from engine.data.sources import ImageSet


def read(path: Path, size: Sequence[int], look_only: bool = False) -> np.ndarray:
    """The pixel values of a mask, uint8 [H, W]; empty where only the header was looked at.

    Args:
        size: (width, height) of the photograph.

    Raises:
        BadInput: it is missing, damaged, no PNG of indices, or of another size.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != tuple(size):
                raise BadInput(f"{path} has {image.width}x{image.height} pixels, but its image has {size[0]}x{size[1]}")
            if image.mode not in ("P", "L"):
                raise BadInput(
                    f"{path} has pixels of type {image.mode}, where indices belong (a PNG with a palette, or grey)"
                )
            return np.zeros((0, 0), np.uint8) if look_only else np.array(image)
    except FileNotFoundError as error:
        raise BadInput(f"the mask {path} is missing") from error
    except BadInput:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes; whatever it is, the file is bad
        raise BadInput(f"the mask {path} cannot be read: {str(error)[:200] or type(error).__name__}") from error


@dataclass(frozen=True)
class IndexMasks:
    """N readable images with a mask each, a `SemanticSet`.

    Attributes:
        images: in order of name; `images.bad` says which were left out.
        semantic_classes: K names.
        masks: N paths below the root of the images.
        label_of: int16 [256], the label (or 255, not to be counted) of each value that a mask may hold; -1 for others.
    """

    images: ImageSet
    semantic_classes: tuple[str, ...]
    masks: tuple[str, ...]
    label_of: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def semantic(self, index: int) -> np.ndarray:
        """uint8 [H, W] of one image, 0 to K - 1, or 255 for what is not to be counted.

        Raises:
            BadInput: the mask is damaged, has another size than its image, or a value that stands for no class.
        """
        path = self.images.root / self.masks[index]
        values = read(path, self.images.sizes[index].tolist())
        labels = self.label_of[values]
        if len(unknown := values[labels < 0]):
            raise BadInput(f"{path} has the value {unknown[0]}, which stands for no class")
        return labels.astype(np.uint8)


def open_folders(
    root: Path,
    split: str,
    photographs: str,
    masks: str,
    classes: Sequence[str],
    label_of: np.ndarray,
    bad_limit: float,
    screening: str,
) -> IndexMasks:
    """Reads the .jpg files below root/photographs, and the .png file of the same name below root/masks for each.

    Masks named as another one, an underscore and more are passed over: toolboxes write such beside the published ones.

    Raises:
        BadInput: there are none, an image has no mask or a mask no image, a mask has another size or is no PNG of indices, or too
            many images are bad.
    """
    check_categories(classes, root)
    paths = _by_name(root, photographs, ".jpg")
    there = _by_name(root, masks, ".png").keys()
    if not paths:
        raise BadInput(f"{root / photographs} has no images: .jpg files belong there")
    derived = {name for name in there if name.rpartition("_")[0] in paths}
    if strays := sorted(there - paths.keys() - derived):
        raise BadInput(f"the mask {root / masks / strays[0]}.png has no image in {root / photographs}")
    names = list(paths)
    found, kept = readable(root, list(paths.values()), split, root / photographs, bad_limit, screening)
    kept_masks = tuple(f"{masks}/{names[place]}.png" for place in kept)
    for path, size in zip(kept_masks, found.sizes.tolist(), strict=True):
        read(root / path, size, look_only=True)
    return IndexMasks(found, tuple(classes), kept_masks, label_of)


def _by_name(root: Path, folder: str, ending: str) -> dict[str, str]:
    """The files of an ending below a folder: paths below the root, by the part that follows the folder, without ending."""
    paths = (file.path for file in walk(root, folder) if file.path.lower().endswith(ending))
    return {path.removeprefix(f"{folder}/")[: -len(ending)]: path for path in paths}

"""Parts of a set of images: some ids of it, a fixed few of each class, or those that published lists name."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from engine.core.errors import BadInput
from engine.data.sets import synthetic
from engine.data.sources import ImageSet


def subset(images: ImageSet, ids: np.ndarray | Tensor) -> ImageSet:
    """The images of some ids (int64 [n]) as a set of their own; what is read for a bad one stands in its place."""
    ids = images.substitute[np.asarray(ids)]
    return dataclasses.replace(
        images,
        paths=synthetic.Names(len(ids)) if images.synthetic else [images.paths[i] for i in ids],
        labels=None if images.labels is None else images.labels[ids],
        sizes=images.sizes[ids],
        substitute=np.arange(len(ids)),
        bad=(),
        ranges=images.ranges and images.ranges.take(ids),
    )


def class_orders(labels_n: np.ndarray, seed: int) -> dict[int, np.ndarray]:
    """By class, the rows of its images in a random order: a pure function of labels and seed."""
    # RandomState, whose stream numpy has frozen: the orders stay the same for good
    return {
        int(c): np.random.RandomState([seed, c]).permutation(np.flatnonzero(labels_n == c)) for c in np.unique(labels_n)
    }


def few_per_class(images: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` images of each class, the first split that low-shot evaluation draws with this seed.

    Raises:
        BadInput: no labels, or a class has fewer images.
    """
    if images.labels is None:
        raise BadInput(f"{images.root} has no classes, so no images of each class can be chosen.")
    orders = class_orders(images.labels, seed)
    for label, order in orders.items():
        if len(order) < count:
            name = images.classes[label] if images.classes else label
            raise BadInput(
                f"class {name} has {len(order)} training images, not {count}; choose fewer labels per class."
            )
    return subset(images, np.sort(np.concatenate([order[:count] for order in orders.values()])))


def listed(files: Sequence[Path], paths: Sequence[str] | None, protocol: str) -> dict[str, list[np.ndarray]]:
    """Row numbers of the images that published lists name, one image per line; lists of one file stem are splits of one subset.

    An image is named by its path, or what of it only one image has: the path without its first folder, the file's name, with
    its ending or without.

    Args:
        paths: of all images, or None where they are not known.
        protocol: who wants them, for messages.

    Returns:
        By stem, int64 rows of each file, ascending.

    Raises:
        BadInput: a file can't be read, or it names no image, or something that is not one image.
    """
    if paths is None:
        raise BadInput(f"{protocol} split files need features that know their image paths; leave files empty.")
    row_of: dict[str, int | None] = {}
    for row, path in enumerate(paths):
        for name in {path, path.partition("/")[2], Path(path).name, Path(path).stem}:
            row_of[name] = None if name in row_of else row  # None: several images share this name
    subsets: dict[str, list[np.ndarray]] = {}
    for file in files:
        try:
            names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{protocol} split file {file} cannot be read; give a text file of image names.") from error
        unclear = [name for name in names if row_of.get(name) is None]
        if unclear or not names:
            wrong = f"{unclear[0]}, which is not one training image" if unclear else "no image"
            raise BadInput(f"{protocol} split file {file} names {wrong}; give one training image per line.")
        subsets.setdefault(file.stem, []).append(np.unique([row_of[name] for name in names]))
    return subsets

"""Parts of a set of images: some ids of it, or a fixed few of each class."""

import dataclasses

import numpy as np
from torch import Tensor

from engine.data.sources import ImageSet
from engine.errors import BadInput


def subset(images: ImageSet, ids: np.ndarray | Tensor) -> ImageSet:
    """The images of some ids (int64 [n]) as a set of their own; what is read for a bad one stands in its place."""
    ids = images.substitute[np.asarray(ids)]
    return dataclasses.replace(
        images,
        paths=[images.paths[i] for i in ids],
        labels=None if images.labels is None else images.labels[ids],
        sizes=images.sizes[ids],
        substitute=np.arange(len(ids)),
        bad=(),
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

"""How the tests of the loader read batches and compare them."""

import itertools

import numpy as np
import torch

from engine.data.pipeline import TrainLoader
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, byol_views

SIZE = (32, 32)
MEAN = np.array(IMAGENET_MEAN) * 255
STD = np.array(IMAGENET_STD) * 255


def take(loader, count):
    return list(itertools.islice(loader, count))


def loader(images, views=None, batch_size=64, **options):
    options = {"seed": 0, "threads": 1} | options
    return TrainLoader(images, byol_views(SIZE) if views is None else views, batch_size, **options)


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.step == other.step
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.labels, other.labels)
        for view, same in zip(one.images, other.images, strict=True):
            assert torch.equal(view, same)


def pixels(view_CHW):
    """Back to 0..255, rows and columns first."""
    return view_CHW.permute(1, 2, 0).numpy() * STD + MEAN

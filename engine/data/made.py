"""Batches of images that are made on the device as they are asked for: for throughput, and where no image can be read.

They have the statistics of normalised pixels and show nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.core.draws import seed_of
from engine.data.batch import Batch
from engine.data.sets.synthetic import NAME
from engine.data.sources import ImageSet


class Made:
    """Batches of numbered steps; the pixels are a function of seed and step and of the first image asked for.

    Args:
        images: the set.
        sizes: (height, width) of each view.
        ids_of: a step's ids, int64 [b]; StopIteration past the last step.
        device: where they are made.
        seed: not negative.
        start: the first step.
    """

    def __init__(
        self,
        images: ImageSet,
        sizes: Sequence[tuple[int, int]],
        ids_of: Callable[[int], np.ndarray],
        device: torch.device,
        seed: int,
        start: int,
    ):
        self._images, self._sizes, self._ids_of = images, tuple(sizes), ids_of
        self._generator, self._seed, self._step = torch.Generator(device), seed, start

    def __iter__(self) -> "Made":
        return self

    def __next__(self) -> Batch:
        step, ids = self._step, self._ids_of(self._step)
        self._step += 1
        self._generator.manual_seed(seed_of(self._seed, NAME, step, int(ids[0])))
        device = self._generator.device
        views = tuple(torch.randn(len(ids), 3, *size, generator=self._generator, device=device) for size in self._sizes)
        return Batch.of(self._images, step, ids, views)

    def close(self) -> None:
        """There is nothing to free."""

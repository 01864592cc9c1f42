"""What a loader gives for one step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.data.sources import ImageSet


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step; its memory is its own.

    Attributes:
        ids: int64 [b] on the CPU: the images that were read (a bad file's substitute, not the bad file).
        images: one fp32 [b, 3, H, W] on the device per view, normalised by ImageNet's mean and standard deviation. Where views
            have their images' own aspect this is the room for an image, whose values [3, h, w] come first in it.
        labels: int64 [b] on the CPU, or None where the set has no classes.
        step: the global step, or for evaluation the number of the batch.
        sizes: int64 [b, V, 2] on the CPU, (h, w) in pixels of each of the V views, where they have their images' own aspect.
    """

    ids: Tensor
    images: tuple[Tensor, ...]
    labels: Tensor | None
    step: int
    sizes: Tensor | None = None

    @classmethod
    def of(cls, images: ImageSet, step: int, ids: np.ndarray, views: tuple[Tensor, ...]) -> "Batch":
        """The views of these ids (int64 [b]) with their labels."""
        labels = None if images.labels is None else torch.from_numpy(images.labels[ids])
        return cls(ids=torch.from_numpy(ids), images=views, labels=labels, step=step)

    @property
    def shapes(self) -> dict[str, Tensor]:
        """What a step is told of the images besides what is drawn: "sizes", where they have their own aspect."""
        return {} if self.sizes is None else {"sizes": self.sizes}

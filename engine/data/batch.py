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
        images: one fp32 [b, 3, H, W] on the device per view, normalised by ImageNet's mean and standard deviation.
        labels: int64 [b] on the CPU, or None where the set has no classes.
        step: the global step, or for evaluation the number of the batch.
    """

    ids: Tensor
    images: tuple[Tensor, ...]
    labels: Tensor | None
    step: int

    @classmethod
    def of(cls, images: ImageSet, step: int, ids: np.ndarray, views: tuple[Tensor, ...]) -> "Batch":
        """The views of these ids (int64 [b]) with their labels."""
        labels = None if images.labels is None else torch.from_numpy(images.labels[ids])
        return cls(ids=torch.from_numpy(ids), images=views, labels=labels, step=step)

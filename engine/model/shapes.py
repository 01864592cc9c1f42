"""Images of many shapes in one batch: those of one shape are a batch of their own, and all of these lie back to back in the
packed trunk as views of several sizes do. There are few shapes, for they are grids of whole patches.

Shapes: B images of a batch, S of one shape, N patches at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.host_memory import to_device
from engine.model.tokens import View


@dataclass(frozen=True)
class Alike:
    """The images of a batch that have one shape.

    Attributes:
        images: fp32 [S, 3, h, w].
        rows: int64 [S] on their device, which of the batch they are; None: all of them, in order.
    """

    images: Tensor
    rows: Tensor | None = None

    def view(self, visible: Tensor | None = None) -> View:
        """Of these images, and of these patches [S, V] of them."""
        return View(self.images, visible, passing=self.rows is not None)

    def of(self, values_B: Tensor) -> Tensor:
        """Their rows of what the batch has, [S, ...]."""
        return values_B if self.rows is None else values_B[self.rows]


def by_shape(images_B3HW: Tensor, sizes_B2: Tensor | None) -> list[Alike]:
    """The batch, shape by shape, in order of height, then of width; images of one shape in the batch's order.

    Args:
        images_B3HW: room for an image each, whose own values [3, h, w] come first in it.
        sizes_B2: (h, w) in pixels, int64 on the CPU; None: all images fill their room.
    """
    if sizes_B2 is None:
        return [Alike(images_B3HW)]
    sizes_S2, which_B, counts = sizes_B2.unique(dim=0, return_inverse=True, return_counts=True)
    order_B = to_device(which_B.argsort(stable=True), images_B3HW.device)
    flat, found = images_B3HW.flatten(1), []
    for (height, width), rows in zip(sizes_S2.tolist(), order_B.split(counts.tolist()), strict=True):
        found.append(Alike(flat[:, : 3 * height * width][rows].view(-1, 3, height, width), rows))
    return found


def in_order(parts: Sequence[Tensor], alike: Sequence[Alike]) -> Tensor:
    """What was made of the images, shape by shape [S, ...], in the order of the batch, [B, ...]."""
    if alike[0].rows is None:
        return parts[0]
    rows_B = torch.cat([group.rows for group in alike])
    return torch.cat(list(parts))[rows_B.argsort()]

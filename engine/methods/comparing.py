"""What methods are whose loss compares the images of a batch. No method itself; `engine.methods.names` leaves it out."""

from abc import abstractmethod

import torch
from torch import Tensor

from engine.methods.base import Method, Rows


class Comparing(Method):
    """A method whose loss compares the images of a batch, in two parts: what each image is represented by, and what is made of
    these rows.

    So a batch that is too large for one pass is represented in micro-batches and compared as a whole
    (`engine.training.gradient_cache`), which calls `represent` up to twice, and the others once for an update. What one image's
    rows are depends on no other image (a norm over the batch belongs into `compare`, and so do queues and all that
    `after_step` takes up), and on random numbers through `drawn` only.
    """

    @abstractmethod
    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        """The rows that gradients flow through; arguments as of `forward`. A term of the loss that is a mean over images may be
        among them, as one row [1]."""

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        """The rows that they are compared with, a teacher's for example, under names of their own; called without autograd."""
        return {}

    @abstractmethod
    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `forward` returns, from the rows of both kinds of the whole batch, with its ids and draws."""

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = self.represent_targets(images, ids, drawn)
        return self.compare(self.represent(images, ids, drawn) | targets, ids, drawn)

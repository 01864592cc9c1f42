"""Telling an image from the others of the batch, over all ranks.

Shapes: b rows of this rank, B of all ranks, E embedding width.
"""

import torch
from torch import Tensor

import kernels
from engine.core import dist


def own_places(rows_bE: Tensor) -> Tensor:
    """Where this rank's rows lie among those of all ranks, int64 [b]."""
    return torch.arange(len(rows_bE), device=rows_bE.device) + dist.rank() * len(rows_bE)


def pick_own(queries_bE: Tensor, keys_BE: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of picking, for each unit query, the key of its own image out of those of all ranks."""
    return kernels.info_nce(queries_bE, keys_BE, own_places(queries_bE), temperature)

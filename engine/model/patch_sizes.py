"""Patches of another size than the model's, from the weights of its own: those for Q x Q pixels are a fixed linear function of
those for P x P, made anew at each step, so that only the latter are stored and trained (FlexiViT: Beyer et al., CVPR 2023,
arXiv 2212.08013).

B is the map [Q * Q, P * P] that resizes a patch bilinearly, channel by channel. A patch is embedded by pinv(B^T) w (PI-resize),
so that one that was resized is as it was before: <x, w> = <B x, pinv(B^T) w> for Q >= P. What is predicted of it is, likewise, B
times what was predicted before; this is ours. As B resizes rows as it does columns, it is the Kronecker product of one matrix
with itself, and so is its pseudo-inverse: products along rows and along columns do the same.

Shapes: P and Q sides of a patch, C width.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.core.lasting import lasting


def embedding_for(weight_C3PP: Tensor, side: int) -> Tensor:
    """A patch projection's weights for patches of side Q, [C, 3, Q, Q]; the very same where that is P.

    In fp64 whatever the caller computes in, as positions are resampled: the same bits at every run.
    """
    own = weight_C3PP.shape[2]
    if side == own:
        return weight_C3PP
    return _along_rows_and_columns(weight_C3PP, _embedding(own, side, weight_C3PP.device), 2)


def prediction_for(layer: Tensor, own: int, side: int) -> Tensor:
    """Weights [P * P * 3, C], or biases [P * P * 3], of what predicts the pixels (row, column, channel) of a patch, for patches
    of side Q: [Q * Q * 3, C], or [Q * Q * 3]; the very same where that is P, `own`. In fp64, likewise."""
    if side == own:
        return layer
    pixels_PP3 = layer.unflatten(0, (own, own, 3))
    return _along_rows_and_columns(pixels_PP3, _resizing(own, side, layer.device), 0).flatten(0, 2)


def _along_rows_and_columns(x: Tensor, matrix_QP: Tensor, first: int) -> Tensor:
    """Two dimensions P, the `first` and the one after it, become Q."""
    wide = x.double()
    for dim in (first, first + 1):
        wide = torch.tensordot(wide, matrix_QP, ([dim], [1])).movedim(-1, dim)
    return wide.to(x.dtype)


@cache  # a captured step reads them where they lie
def _resizing(own: int, side: int, device: torch.device) -> Tensor:
    """fp64 [Q, P]: what each pixel of a resized row takes of those of the row. One tensor per arguments, to read only."""
    with lasting(), torch.device("cpu"):
        axis = torch.eye(own, dtype=torch.float64)[None, None]  # [1, 1, place, of which]
        return F.interpolate(axis, size=(side, own), mode="bilinear")[0, 0].to(device)


@cache
def _embedding(own: int, side: int, device: torch.device) -> Tensor:
    """fp64 [Q, P]: the pseudo-inverse of the transpose of that."""
    with lasting():
        return torch.linalg.pinv(_resizing(own, side, torch.device("cpu")).T).to(device)

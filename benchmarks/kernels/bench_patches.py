"""gather_patches and masked_pixel_loss against cutting every image into all of its patches first, compiled or not."""

from collections.abc import Iterator

import torch
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, wide
from kernels.patches import cost

PATCH = 16


def all_patches(images: Tensor, size: int) -> Tensor:
    batch, _, height, width = images.shape
    grid = images.unflatten(3, (width // size, size)).unflatten(2, (height // size, size))
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, 3 * size**2)


def gather_after(images: Tensor, indices: Tensor) -> Tensor:
    patches = all_patches(images, PATCH)
    return patches.gather(1, indices.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def loss_after(prediction: Tensor, images: Tensor, indices: Tensor) -> Tensor:
    target = wide(all_patches(images, PATCH))
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    target = target.gather(1, indices.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
    return ((wide(prediction) - target) ** 2).mean()


def cases(at: Machine) -> Iterator[Case]:
    """MAE at 224 pixels, patch 16: a quarter of the patches is seen, three quarters are predicted."""
    size = at.dtype.itemsize
    yield Case(
        "patches", "gather 49 of 196 patches", cost(at.images * 49, PATCH, 4, 4)[:1],
        lambda: (_images(at), _indices(at)[:, :49]),
        lambda images, indices: kernels.gather_patches(images, indices, PATCH),
        gather_after, {},
    )  # fmt: skip
    forward = cost(at.images * 147, PATCH, 4, size)[1]
    elements = at.images * 147 * 3 * PATCH**2
    backward = forward._replace(bytes=forward.bytes + elements * size)  # the gradient of the prediction is written
    yield Case(
        "patches", "pixel loss on 147 of 196 patches", (forward, backward),
        lambda: (at.randn(at.images, 147, 3 * PATCH**2), _images(at), _indices(at)[:, 49:]),
        _loss, loss_after, {}, leaves=(0,),
    )  # fmt: skip


def _loss(prediction: Tensor, images: Tensor, indices: Tensor) -> Tensor:
    return kernels.masked_pixel_loss(prediction, images, indices, PATCH)


def _images(at: Machine) -> Tensor:
    return torch.randn(at.images, 3, 224, 224, device=at.device)


def _indices(at: Machine) -> Tensor:
    return torch.rand(at.images, 196, device=at.device).argsort(1)

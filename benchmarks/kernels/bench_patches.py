"""gather_patches and masked_pixel_loss against cutting every image into all of its patches first."""

import pytest
import torch
from torch import Tensor

import kernels


def all_patches(images: Tensor, size: int) -> Tensor:
    batch, _, height, width = images.shape
    grid = images.unflatten(3, (width // size, size)).unflatten(2, (height // size, size))
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, 3 * size**2)


def gather_after(images: Tensor, indices: Tensor, size: int) -> Tensor:
    patches = all_patches(images, size)
    return patches.gather(1, indices.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def loss_after(prediction: Tensor, images: Tensor, indices: Tensor, size: int) -> Tensor:
    target = all_patches(images, size).float()
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    target = target.gather(1, indices.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
    return ((prediction.float() - target) ** 2).mean()


@pytest.fixture
def asked(machine):
    """MAE at 224 pixels, patch 16: a quarter of the patches is seen, three quarters are predicted."""
    images = machine.randn(machine.batch, 3, 224, 224)
    order = torch.rand(machine.batch, 196, device=machine.device).argsort(1)
    return images, order[:, :49], order[:, 49:]


@pytest.mark.parametrize("form", ["ours", "plain"])
def bench_gather_patches(clock, asked, form):
    images, visible, _ = asked
    function = {"ours": kernels.gather_patches, "plain": gather_after}[form]
    clock("gather 49 of 196 patches", lambda x: function(x, visible, 16), images)


@pytest.mark.parametrize("form", ["ours", "plain"])
def bench_masked_pixel_loss(clock, machine, asked, form):
    images, _, masked = asked
    prediction = machine.randn(machine.batch, 147, 768).requires_grad_()
    function = {"ours": kernels.masked_pixel_loss, "plain": loss_after}[form]
    clock("pixel loss on 147 of 196 patches", lambda x: function(x, images, masked, 16), prediction)

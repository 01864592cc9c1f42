"""Patches of images: gathering only those that are asked for, and the pixel loss of masked auto-encoders on them.

B images, H x W pixels, P patch size, N patches asked for. Patch i is row i // (W/P), column i % (W/P) of the grid.

Why a kernel at all: published code cuts every image into all of its patches, in fp32, to use a quarter (the visible) or
three quarters (the masked) of them. The pixels of the asked patches must be read once and, for the loss, the
predictions once; nothing else needs to move. In this form the compiler fuses both ops, so the reference stays plain
torch and can be traced.

Every implementation is a module with these two functions and gradients of its own:
    gather_patches(images, indices, patch_size) -> [B,N,P*P*3]
    masked_pixel_loss(prediction, images, indices, patch_size, normalise) -> scalar
"""

import torch
from torch import Tensor

from kernels.choice import chosen, load
from kernels.cost import Cost


def gather_patches(images: Tensor, indices: Tensor, patch_size: int) -> Tensor:
    """The asked patches as rows of pixels.

    Args:
        images: [B, 3, H, W], any floating dtype; H and W are multiples of patch_size.
        indices: int64 [B, N], row-major patch numbers in [0, H/P * W/P), in any order, repeats allowed. Eager CPU calls
            check the range; compiled code and a GPU trust it.
        patch_size: P, in pixels.

    Returns:
        [B, N, P*P*3] in the dtype of images, element order (row, column, channel). Differentiable in images.

    Raises:
        ValueError: for a shape, dtype or device that is not the above, or an index out of range.
    """
    _check("gather_patches", images, indices, patch_size)
    return load("patches", chosen("patches", images.device)).gather_patches(images, indices, patch_size)


def masked_pixel_loss(
    prediction: Tensor, images: Tensor, indices: Tensor, patch_size: int, normalise: bool = True
) -> Tensor:
    """Mean squared error between predicted and true pixels, averaged within a patch, then over all asked patches.

    With `normalise` each true patch is brought to mean 0 and variance 1 by its own statistics: unbiased variance, 1e-6
    added to it under the root. Source: He et al., Masked Autoencoders Are Scalable Vision Learners, 2021, section 3 and
    its code.

    Args:
        prediction: [B, N, P*P*3], any floating dtype, element order (row, column, channel).
        images: see `gather_patches`.
        indices: see `gather_patches`.
        patch_size: see `gather_patches`.
        normalise: per-patch normalisation of the target.

    Returns:
        Scalar, fp64 where prediction or images are, else fp32; 0 for no patches. Differentiable in prediction and
        images.

    Raises:
        ValueError: for a shape, dtype or device that is not the above, or an index out of range.
    """
    _check("masked_pixel_loss", images, indices, patch_size)
    expected = (*indices.shape, 3 * patch_size**2)
    if prediction.shape != expected or not prediction.is_floating_point():
        raise ValueError(
            f"masked_pixel_loss needs a floating prediction of shape {list(expected)}, "
            f"got {prediction.dtype} {list(prediction.shape)}"
        )
    implementation = load("patches", chosen("patches", images.device))
    return implementation.masked_pixel_loss(prediction, images, indices, patch_size, normalise)


def cost(patches: int, patch_size: int, image_size: int, prediction_size: int) -> tuple[Cost, Cost]:
    """Floor of gather_patches and of masked_pixel_loss forward; sizes are bytes per element of the two inputs."""
    elements = patches * 3 * patch_size**2
    gather = Cost(2 * elements * image_size, 0)
    loss = Cost(elements * (image_size + prediction_size), 8 * elements)
    return gather, loss


def _check(op: str, images: Tensor, indices: Tensor, patch_size: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"{op} needs floating images of shape [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    height, width = images.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"{op} needs images in whole patches, got {height}x{width} pixels for patches of {patch_size}")
    if (
        indices.ndim != 2
        or indices.dtype != torch.int64
        or len(indices) != len(images)
        or indices.device != images.device
    ):
        raise ValueError(
            f"{op} needs indices as int64 [{len(images)}, N] on {images.device}, "
            f"got {indices.dtype} {list(indices.shape)} on {indices.device}"
        )
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        low, high, patches = int(indices.min()), int(indices.max()), (height // patch_size) * (width // patch_size)
        if low < 0 or high >= patches:
            raise ValueError(f"{op} needs indices between 0 and {patches - 1}, got {low if low < 0 else high}")

"""Patches of images: gathering only those that are asked for, and the pixel loss of masked auto-encoders on them.

B images, H x W pixels, P patch size, N patches asked for. Patch i is row i // (W/P), column i % (W/P) of the grid.

Why a kernel at all: published code cuts every image into all of its patches, in fp32, to use a quarter (the visible) or
three quarters (the masked) of them. The pixels of the asked patches must be read once and, for the loss, the
predictions once; nothing else needs to move. Nothing is saved for backward but the inputs: the statistics of a patch
come with its pixels, which backward reads anyway.

The reference is plain torch that the compiler sees through: gather_patches and masked_pixel_loss, with the arguments
below. Every other implementation is opaque to it, a module with these four functions:
    gather(images, indices, patch_size) -> [B,N,P*P*3]
    scatter(rows[B,N,P*P*3], indices, height, width, patch_size, dtype) -> [B,3,H,W]
        the transpose of gather, and so its gradient: the rows of one patch are summed, pixels that nobody asked for are 0
    loss_forward(prediction, images, indices, patch_size, normalise) -> fp32 scalar
    loss_backward(grad_loss, prediction, images, indices, patch_size, normalise, of_pixels) -> [B,N,P*P*3]
        gradient of prediction in its dtype, or, with of_pixels, of the patches' pixels in fp32
"""

import torch
from torch import Tensor

from kernels.checks import check_range
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of

torch.library.define(
    "tessera::gather_patches", "(Tensor images, Tensor indices, int patch_size, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::scatter_patches",
    "(Tensor rows, Tensor indices, SymInt height, SymInt width, int patch_size, ScalarType dtype, str implementation)"
    " -> Tensor",
)
_LOSS = "Tensor prediction, Tensor images, Tensor indices, int patch_size, bool normalise"
torch.library.define("tessera::masked_pixel_loss", f"({_LOSS}, str implementation) -> Tensor")
torch.library.define(
    "tessera::masked_pixel_loss_backward", f"(Tensor grad_loss, {_LOSS}, bool of_pixels, str implementation) -> Tensor"
)


def gather_patches(images: Tensor, indices: Tensor, patch_size: int) -> Tensor:
    """The asked patches as rows of pixels.

    Args:
        images: [B, 3, H, W], any floating dtype; H and W are multiples of patch_size.
        indices: int64 [B, N], row-major patch numbers in [0, H/P * W/P), in any order, repeats allowed. The range is
            checked on the CPU, and with TESSERA_DEBUG=1 in the environment on a GPU as well, which is waited for;
            otherwise a GPU trusts it, and so does compiled code of the reference.
        patch_size: P, in pixels.

    Returns:
        [B, N, P*P*3] in the dtype of images, element order (row, column, channel). Differentiable in images.

    Raises:
        ValueError: for a shape, dtype or device that is not the above, or an index out of range.
    """
    _check("gather_patches", images, indices, patch_size)
    shape_class = _shape_class(images, indices, patch_size)
    implementation = chosen("patches", images.device, "gather_patches", shape_class)
    if implementation == "reference":
        _check_range("gather_patches", images, indices, patch_size)
        return load("patches", implementation).gather_patches(images, indices, patch_size)
    return torch.ops.tessera.gather_patches(images, indices, patch_size, implementation)


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
    if prediction.shape != expected or not prediction.is_floating_point() or prediction.device != images.device:
        raise ValueError(
            f"masked_pixel_loss needs a floating prediction of shape {list(expected)} on {images.device}, "
            f"got {prediction.dtype} {list(prediction.shape)} on {prediction.device}"
        )
    shape_class = _loss_shape_class(prediction, images, indices, patch_size)
    implementation = chosen("patches", images.device, "masked_pixel_loss", shape_class)
    if implementation == "reference":
        _check_range("masked_pixel_loss", images, indices, patch_size)
        return load("patches", implementation).masked_pixel_loss(prediction, images, indices, patch_size, normalise)
    return torch.ops.tessera.masked_pixel_loss(prediction, images, indices, patch_size, normalise, implementation)


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


def _check_range(op: str, images: Tensor, indices: Tensor, patch_size: int) -> None:
    height, width = images.shape[2:]
    check_range(op, "indices", indices, (height // patch_size) * (width // patch_size))


def _shape_class(images: Tensor, indices: Tensor, patch_size: int) -> str:
    return f"{name_of(images.dtype)} P{patch_size}"


def _loss_shape_class(prediction: Tensor, images: Tensor, indices: Tensor, patch_size: int, *_: object) -> str:
    return f"{name_of(prediction.dtype)} {name_of(images.dtype)} P{patch_size}"


@implement("tessera::gather_patches", _shape_class)
def _gather(images, indices, patch_size, implementation):
    _check_range("gather_patches", images, indices, patch_size)
    return load("patches", implementation).gather(images, indices, patch_size)


@implement("tessera::scatter_patches")
def _scatter(rows, indices, height, width, patch_size, dtype, implementation):
    return load("patches", implementation).scatter(rows, indices, height, width, patch_size, dtype)


@implement("tessera::masked_pixel_loss", _loss_shape_class)
def _loss(prediction, images, indices, patch_size, normalise, implementation):
    _check_range("masked_pixel_loss", images, indices, patch_size)
    return load("patches", implementation).loss_forward(prediction, images, indices, patch_size, normalise)


@implement("tessera::masked_pixel_loss_backward")
def _loss_backward(grad_loss, prediction, images, indices, patch_size, normalise, of_pixels, implementation):
    backward = load("patches", implementation).loss_backward
    return backward(grad_loss, prediction, images, indices, patch_size, normalise, of_pixels)


@torch.library.register_fake("tessera::gather_patches")
def _gather_fake(images, indices, patch_size, implementation):
    return images.new_empty(*indices.shape, 3 * patch_size**2)


@torch.library.register_fake("tessera::scatter_patches")
def _scatter_fake(rows, indices, height, width, patch_size, dtype, implementation):
    return rows.new_empty(rows.shape[0], 3, height, width, dtype=dtype)


@torch.library.register_fake("tessera::masked_pixel_loss")
def _loss_fake(prediction, images, indices, patch_size, normalise, implementation):
    return prediction.new_empty((), dtype=torch.float32)


@torch.library.register_fake("tessera::masked_pixel_loss_backward")
def _loss_backward_fake(grad_loss, prediction, images, indices, patch_size, normalise, of_pixels, implementation):
    return prediction.new_empty(prediction.shape, dtype=torch.float32 if of_pixels else prediction.dtype)


def _save_gather(ctx, inputs, output):
    images, indices, *ctx.plain = inputs
    ctx.save_for_backward(indices)
    ctx.size, ctx.dtype = images.shape[2:], images.dtype


def _differentiate_gather(ctx, grad_rows):
    patch_size, implementation = ctx.plain
    grad_images = torch.ops.tessera.scatter_patches(
        grad_rows, *ctx.saved_tensors, *ctx.size, patch_size, ctx.dtype, implementation
    )
    return grad_images, None, None, None


def _save_loss(ctx, inputs, output):
    *tensors, patch_size, normalise, implementation = inputs
    ctx.save_for_backward(*tensors)
    ctx.plain = patch_size, normalise, implementation


def _differentiate_loss(ctx, grad_loss):
    _, images, indices = ctx.saved_tensors
    patch_size, normalise, implementation = ctx.plain

    def backward(of_pixels):
        return torch.ops.tessera.masked_pixel_loss_backward(
            grad_loss, *ctx.saved_tensors, patch_size, normalise, of_pixels, implementation
        )

    grad_prediction = grad_images = None
    if ctx.needs_input_grad[0]:
        grad_prediction = backward(of_pixels=False)
    # no recipe asks for it, but the op is differentiable in both
    if ctx.needs_input_grad[1]:
        grad_images = torch.ops.tessera.scatter_patches(
            backward(of_pixels=True), indices, *images.shape[2:], patch_size, images.dtype, implementation
        )
    return grad_prediction, grad_images, None, None, None, None


torch.library.register_autograd("tessera::gather_patches", _differentiate_gather, setup_context=_save_gather)
torch.library.register_autograd("tessera::masked_pixel_loss", _differentiate_loss, setup_context=_save_loss)

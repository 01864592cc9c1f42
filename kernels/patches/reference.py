"""Patches in plain torch, traceable. B images, N asked patches, C channels, P patch size, H x W pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_patches(images: Tensor, indices_BN: Tensor, patch_size: int) -> Tensor:
    """See `kernels.gather_patches`."""
    batch, channels, height, width = images.shape
    across = width // patch_size
    # an image is a list of runs of P pixels; a patch is P x C of them
    runs = images.reshape(-1, patch_size)
    row_BN, column_BN = indices_BN // across, indices_BN % across
    image_B1 = torch.arange(batch, device=images.device).unsqueeze(1)
    first_BN = (image_B1 * (channels * height) + row_BN * patch_size) * across + column_BN
    down_P1 = torch.arange(patch_size, device=images.device).unsqueeze(1) * across
    channel_C = torch.arange(channels, device=images.device) * (height * across)
    run_BNPC = first_BN[..., None, None] + (down_P1 + channel_C)
    patches_BNPCP = runs.index_select(0, run_BNPC.flatten()).view(*run_BNPC.shape, patch_size)
    return patches_BNPCP.transpose(3, 4).flatten(2)


def masked_pixel_loss(
    prediction: Tensor, images: Tensor, indices_BN: Tensor, patch_size: int, normalise: bool
) -> Tensor:
    """See `kernels.masked_pixel_loss`."""
    target = gather_patches(images, indices_BN, patch_size)
    wide = torch.float64 if torch.float64 in (prediction.dtype, images.dtype) else torch.float32
    target = target.to(wide)
    if normalise:
        # written out: aten's variance on a CPU takes three times as long
        target = target - target.mean(-1, keepdim=True)
        variance = target.square().sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = target * torch.rsqrt(variance + 1e-6)
    return F.mse_loss(prediction.to(wide), target, reduction="sum") / max(target.numel(), 1)

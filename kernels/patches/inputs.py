"""What calibration gives gather_patches and masked_pixel_loss."""

from collections.abc import Mapping
from typing import Any

import torch

DIFFERENTIABLE = {"masked_pixel_loss": ("prediction",)}


def fill(name: str, value: Any, arguments: Mapping[str, Any]) -> Any:
    """Different patches of each image, in random order."""
    if name != "indices":
        return value
    (images, count), (height, width) = value.shape, arguments["images"].shape[2:]
    patches = height // arguments["patch_size"] * (width // arguments["patch_size"])
    return torch.rand(images, patches, device=value.device).argsort(1)[:, torch.arange(count) % patches].contiguous()

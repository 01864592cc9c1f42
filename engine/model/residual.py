"""The number format of the residual stream under autocast: what blocks read, add to and hand on.

    fp32   as the recipes' quality was shown: positions and token embeddings are fp32, and so is every sum that follows
    bf16   sums are rounded to 16 bits after each branch, so that a step reads and writes half as many bytes between products

Branches compute alike in both: products in 16 bits, norms within in fp32. Without autocast the stream has its tokens' format.
"""

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def enter(x_TC: Tensor, choice: str) -> Tensor:
    """Tokens as the first block gets them: [T, C], in the chosen format under autocast."""
    return x_TC.to(DTYPES[choice]) if torch.is_autocast_enabled(x_TC.device.type) else x_TC


def add(x_TC: Tensor, change_TC: Tensor) -> Tensor:
    """The stream with a branch added, in its own format: [T, C]. A sum with a wider branch is rounded once."""
    return (x_TC + change_TC).to(x_TC.dtype)


def choose(model: nn.Module, choice: str) -> None:
    """Set the format for all streams inside a model, one of DTYPES."""
    for part in model.modules():
        if hasattr(part, "residual"):
            part.residual = choice

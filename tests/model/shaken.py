"""Models away from their start."""

import torch

from engine.model import vit

MICRO = "vit_micro_patch8_32"
RELATIVE = dict(positions="relative")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(name: str, **overrides):
    """A model whose every parameter is away from its initial value, so that none can be ignored unseen."""
    model = vit.create(name, generator=draw(), **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw(parameter.numel())), alpha=0.02)
    return model

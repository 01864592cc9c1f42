"""Models of two blocks that differ by seed, and what they see."""

import torch

from engine.model import vit

MICRO = "vit_micro_patch8_32"


def shaken(name: str = MICRO, seed: int = 0, **overrides):
    """A model whose every parameter differs from that of any other seed."""
    model, draw = vit.create(name, **{"depth": 2} | overrides), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


def features(model, size=(32, 32)):
    with torch.no_grad():
        return model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(9)))

"""What tests look at and do around an update."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.core.optim import Average
from engine.methods.base import Method
from engine.training.optimizers import move


def scaled_gradients(
    optimizer: torch.optim.Optimizer,
    applied: Tensor | None = None,
    scales: Mapping[nn.Parameter, Tensor] | None = None,
    averages: Sequence[Average] = (),
) -> dict[nn.Parameter, Tensor]:
    """The gradients as a step takes them that is given these arguments."""
    with_gradient = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return {p: p.grad * (scales or {}).get(p, 1.0) for p in with_gradient}


def finish(method: Method, applied: bool = True) -> None:
    """What comes with and after an optimiser's step, without its step."""
    flag = torch.tensor(applied)
    move(method.averages(), flag)
    method.after_step(flag)

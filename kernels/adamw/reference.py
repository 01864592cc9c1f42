"""AdamW by torch's own fused kernel, then averages by another of them: the one that takes a flag on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[Tensor],
    squares: list[Tensor],
    step: Tensor,
    averages: list[Tensor],
    scales: Tensor | None,
    applied: Tensor | None,
    average_weight: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See `kernels.adamw`."""
    if scales is not None:
        torch._foreach_mul_(gradients, list(scales.unbind()) if scales.ndim else scales)
    torch._fused_adamw_(
        parameters, gradients, moments, squares, [], [step.float() + 1] * len(parameters),
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        found_inf=_skips(applied),
    )  # fmt: skip
    if averages:
        move_averages(averages, parameters, average_weight, applied)


def move_averages(averages: Sequence[Tensor], online: Sequence[Tensor], weight: float, applied: Tensor | None) -> None:
    """average += weight * (online - average), in place, in one pass without a temporary; nothing where `applied` is false.

    As a step of plain gradient descent on |average - online|^2 / 2, which torch's fused SGD makes: `online` stands for the
    gradient, decay by 1 adds the average, and the sign is turned. `torch._foreach_lerp_` takes no flag.
    """
    torch._fused_sgd_(
        list(averages), list(online), [], weight_decay=1.0, momentum=0.0, lr=weight, dampening=0.0, nesterov=False,
        maximize=True, is_first_step=False, found_inf=_skips(applied),
    )  # fmt: skip


def _skips(applied: Tensor | None) -> Tensor | None:
    """As torch's fused kernels take it."""
    return None if applied is None else (~applied).to(torch.float32)

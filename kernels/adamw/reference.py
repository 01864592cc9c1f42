"""AdamW by torch's own fused kernel, then averages by another of them: the one that takes a flag on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adamw.arguments import Step


def step(given: Step) -> None:
    """See `kernels.adamw`."""
    scales = given.scales
    if scales is not None:
        torch._foreach_mul_(given.gradients, list(scales.unbind()) if scales.ndim else scales)
    torch._fused_adamw_(
        given.parameters, given.gradients, given.moments, given.squares, [], [given.step.float() + 1] * len(given.parameters),
        lr=given.lr, beta1=given.beta1, beta2=given.beta2, weight_decay=given.weight_decay, eps=given.eps, amsgrad=False,
        maximize=False, found_inf=_skips(given.applied),
    )  # fmt: skip
    if given.averages:
        move_averages(given.averages, given.parameters, given.average_weight, given.applied)


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

"""What a step of AdamW is given, in the order of the registered op."""

from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """See `kernels.adamw`: lists of one length, but for `averages`, which may be empty."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    moments: list[Tensor]
    squares: list[Tensor]
    step: Tensor
    averages: list[Tensor]
    scales: Tensor | None
    applied: Tensor | None
    average_weight: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

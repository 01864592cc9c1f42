"""amp_C, NVIDIA apex's module of kernels, of which nothing is installed: the one name that is used, as of July 2025, by the
formula."""

from types import ModuleType

import torch
from torch import Tensor


def module() -> ModuleType:
    """For sys.modules; `used` lists how many tensors each call took."""
    amp_C = ModuleType("amp_C")
    amp_C.used = []

    def multi_tensor_adam_capturable(
        chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], lr: Tensor, beta1: float, beta2: float,
        epsilon: float, step: Tensor, mode: int, bias_correction: int, weight_decay: float, inv_scale: Tensor,
    ) -> None:  # fmt: skip
        assert (noop_flag.dtype, step.dtype, lr.dtype, inv_scale.dtype) == (torch.int32, torch.int32) + (
            torch.float32,
        ) * 2
        assert all(x.numel() == 1 for x in (noop_flag, step, lr, inv_scale))
        assert (mode, bias_correction) == (1, 1) and chunk_size > 0
        amp_C.used.append(len(tensor_lists[0]))
        if noop_flag == 1:
            return
        first, second = (1 - beta ** int(step) for beta in (beta1, beta2))
        for g, p, m, v in zip(*tensor_lists, strict=True):
            g.mul_(inv_scale)
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            p.sub_(lr * (m / first / ((v / second).sqrt() + epsilon) + weight_decay * p))

    amp_C.multi_tensor_adam_capturable = multi_tensor_adam_capturable
    return amp_C

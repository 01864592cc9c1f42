"""AdamW by NVIDIA apex where the user has built it, which nothing here requires: the kernel under its FusedAdam that takes step,
rate and a flag from the device. Averages follow in a pass of torch's.

Under PyPI's name apex there is another package. Its FusedLAMB has no place here, since no recipe trains by LAMB.
It has not run on a GPU yet: calibration proves it there before it is taken.
"""

import torch
from amp_C import multi_tensor_adam_capturable

from kernels.adamw.arguments import Step
from kernels.adamw.reference import move_averages

NEEDS_GPU = True
CHUNK = 2048 * 32  # elements that a block of apex's takes
DECOUPLED, CORRECTED = 1, 1  # its words for AdamW, with its bias correction


def step(given: Step) -> None:
    """See `kernels.adamw`. ValueError for fp64, where apex keeps moments in fp32."""
    if given.parameters[0].dtype != torch.float32:
        raise ValueError(f"apex keeps moments in float32, got {given.parameters[0].dtype}")
    step, scales, applied = given.step, given.scales, given.applied
    if scales is not None and scales.ndim:
        torch._foreach_mul_(given.gradients, list(scales.unbind()))
    one = step.new_ones(())
    multi_tensor_adam_capturable(
        CHUNK,
        torch.zeros_like(step, dtype=torch.int32) if applied is None else (~applied).to(torch.int32),
        [given.gradients, given.parameters, given.moments, given.squares],
        one * given.lr,
        given.beta1,
        given.beta2,
        given.eps,
        step.to(torch.int32) + 1,
        DECOUPLED,
        CORRECTED,
        given.weight_decay,
        one if scales is None or scales.ndim else scales,
    )
    if given.averages:
        move_averages(given.averages, given.parameters, given.average_weight, applied)

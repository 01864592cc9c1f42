"""One step of AdamW over a list of tensors, with what comes with it in training: gradients scaled (clipping), an average of the
weights moved, all of it left out by a flag on the device.

Why an op: done one after the other, these move 28 bytes a parameter for AdamW itself, 8 for the scaled gradient and 12 for an
average that follows (fp32: a weight, its gradient, two moments and the average are read, all but the gradient written), so
48; in one pass they are 36, and one launch takes all tensors where torch's takes as many as its kernel's arguments hold. The
compiler would do it, but for hundreds of tensors at once it takes minutes.

Every implementation is a module with a function step(given: Step) -> None of the op's arguments (`kernels.adamw.arguments`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.adamw.arguments import Step
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of

DTYPES = (torch.float32, torch.float64)

torch.library.define(
    "tessera::adamw",
    "(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] moments, Tensor(d!)[] squares, Tensor step, "
    "Tensor(e!)[] averages, Tensor? scales, Tensor? applied, float average_weight, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, str implementation) -> ()",
)


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    averages: Sequence[Tensor] = (),
    average_weight: float = 0.0,
    scales: Tensor | None = None,
    applied: Tensor | None = None,
) -> None:
    """Update parameters in place by AdamW, then averages of them by average += average_weight * (parameter - average).

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2, with the schedule in `lr`.

    Args:
        parameters: fp32 or fp64, of any shapes, contiguous.
        gradients: one each, of the same shape and dtype; what they hold afterwards is not promised.
        moments, squares: of the gradients, likewise; zeros before the first step.
        step: fp32 [], the number of steps before this one; it is left as it is, since several calls may share it.
        averages: one each, or none.
        scales: fp32 [] or [n], what all gradients, or each of the n, are multiplied by first.
        applied: bool []; where it is false, nothing is changed but the gradients.

    Raises:
        ValueError: for lists of different lengths, tensors of other shapes, dtypes or layouts than the above.
    """
    _check(parameters, gradients, moments, squares, step, averages, scales, applied)
    if not parameters:
        return
    given = Step(
        list(parameters), list(gradients), list(moments), list(squares), step, list(averages), scales, applied,
        average_weight, lr, *betas, eps, weight_decay,
    )  # fmt: skip
    implementation = chosen("adamw", step.device, "adamw", _shape_class(*given))
    torch.ops.tessera.adamw(*given, implementation)


def cost(elements: int, averaged: bool) -> Cost:
    """Floor of a step over fp32 parameters: four numbers read and three written of each, and an average read and written.

    Flops count a division and a root as one.
    """
    return Cost((28 + 8 * averaged) * elements, (15 + 3 * averaged) * elements)


def _check(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: Tensor,
    averages: Sequence[Tensor],
    scales: Tensor | None,
    applied: Tensor | None,
) -> None:
    lists = {"gradients": gradients, "moments": moments, "squares": squares} | (
        {"averages": averages} if averages else {}
    )
    for name, tensors in lists.items():
        if len(tensors) != len(parameters):
            raise ValueError(f"adamw needs as many {name} as parameters, got {len(tensors)} and {len(parameters)}")
        for parameter, tensor in zip(parameters, tensors, strict=True):
            if (tensor.shape, tensor.dtype, tensor.device) != (parameter.shape, parameter.dtype, parameter.device):
                raise ValueError(
                    f"adamw needs {name} like their parameters, got {tensor.dtype} {list(tensor.shape)} on {tensor.device} for "
                    f"{parameter.dtype} {list(parameter.shape)} on {parameter.device}"
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"adamw needs contiguous {name}, got strides {tensor.stride()} of {list(tensor.shape)}"
                )
    for parameter in parameters:
        if parameter.dtype not in DTYPES or parameter.dtype != parameters[0].dtype or not parameter.is_contiguous():
            raise ValueError(
                "adamw needs contiguous parameters, all in float32 or all in float64, "
                f"got {parameter.dtype} with strides {parameter.stride()}"
            )
    if step.ndim or not step.is_floating_point():
        raise ValueError(f"adamw needs step as a floating point number [], got {step.dtype} {list(step.shape)}")
    if scales is not None and list(scales.shape) not in ([], [len(parameters)]):
        raise ValueError(f"adamw needs scales [] or [{len(parameters)}], got {list(scales.shape)}")
    if applied is not None and (applied.ndim or applied.dtype != torch.bool):
        raise ValueError(f"adamw needs applied as bool [], got {applied.dtype} {list(applied.shape)}")


def _shape_class(*arguments: Any) -> str:
    """Dtype, the power of 16 that holds all elements, whether averages follow and how gradients are scaled."""
    given = Step(*arguments)
    bits = 4 * math.ceil(sum(parameter.numel() for parameter in given.parameters).bit_length() / 4)
    scaled = "" if given.scales is None else " scaled each" if given.scales.ndim else " scaled"
    return f"{name_of(given.parameters[0].dtype)} 2^{bits}{' averaged' * bool(given.averages)}{scaled}"


@implement("tessera::adamw", _shape_class)
def _adamw(*arguments):
    *given, implementation = arguments
    load("adamw", implementation).step(Step(*given))


@torch.library.register_fake("tessera::adamw")
def _adamw_fake(*arguments):
    return None

"""The one tolerance rule of the kernel tests, and the devices they run on."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF_AND_FULL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assert_agrees(
    ours: Callable,
    plain: Callable,
    inputs: Sequence[Tensor],
    factor: float = 2.0,
    cancelled: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Values and gradients of `ours` are at most `factor` times as far from the truth as `plain` in the same dtype.

    The truth is `plain` in float64. Four units in the last place of the largest entry are free, so that plain torch may
    be exact; in float64, where plain is the truth itself, 1e-13 of that entry or of 1. Both functions take `inputs`,
    return one tensor and are differentiated in every input, with one random direction.

    `cancelled` is how large terms are that may cancel in the value, and in a gradient of a direction of 1: where nothing but
    their rounding is left, plain torch may be exact by chance, so four units in fp32's last place of them are free.
    """
    direction = None
    results = []
    for function, dtype in ((plain, torch.float64), (plain, None), (ours, None)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        direction = torch.randn_like(out) if direction is None else direction
        # a direction that every dtype holds exactly
        direction = direction.bfloat16().to(torch.float64)
        grads = torch.autograd.grad(out, leaves, direction.to(out.dtype), allow_unused=True)
        results.append([out, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))])
    in_value, in_gradient = cancelled
    sizes = [in_value, *(in_gradient * direction.abs().amax().item() if in_gradient else 0.0 for _ in inputs)]
    for truth, by_plain, by_ours, size in zip(*results, sizes, strict=True):
        assert_close_as_plain(by_ours, by_plain, truth, factor, size)


def assert_close_as_plain(
    ours: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0, cancelled: float = 0.0
) -> None:
    assert ours.shape == truth.shape
    assert ours.dtype == plain.dtype
    if truth.numel() == 0:
        return
    largest = truth.abs().max()
    free = 1e-13 * largest.clamp(min=1) if ours.dtype == torch.float64 else 4 * torch.finfo(ours.dtype).eps * largest
    free += 4 * min(torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps) * cancelled
    error, plain_error = ((x.double() - truth).abs().max() for x in (ours, plain))
    assert error <= factor * plain_error + free, f"error {error:.3e}, of plain torch {plain_error:.3e}, free {free:.3e}"

"""AdamW in Triton: one launch takes every tensor of the list, reads weight, gradient, moments and average once, and writes them.

Where the tensors lie stands in a table on the device: five addresses, the number of elements and the first program of each, a
column per tensor. A program finds its tensor by halving the range of columns; the table of a ViT-L has 300, 17 KB, which all
programs read from the cache. It is sent anew at each step, for gradients lie elsewhere then; nobody waits for it.

Bias corrections are taken in fp64, one number a program, and betas are constants of the code: 1 - 0.999 in fp32 is off by 3e-5.

E elements of a tensor that a program takes.
"""

import math

import torch
import triton
import triton.language as tl

import kernels.interpreter  # noqa: F401
from kernels.adamw.arguments import Step
from kernels.compiled import Variant

_BLOCK, _WARPS = 1024, 4
_FLOATS = tl.constexpr(tl.pointer_type(tl.float32))


@triton.jit
def _place(table, n, row: tl.constexpr, column):
    return tl.load(table + row * n + column)


@triton.jit
def _load(address, element_E, inside_E, WHOLE: tl.constexpr):
    """fp32 [E] from an address; where all of it is inside and 16 bytes divide the address, four numbers at once."""
    if WHOLE:
        x_E = tl.load(tl.multiple_of(address.to(_FLOATS), 16) + element_E)
    else:
        x_E = tl.load(address.to(_FLOATS) + element_E, mask=inside_E, other=0.0)
    return x_E


@triton.jit
def _store(address, element_E, x_E, inside_E, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(tl.multiple_of(address.to(_FLOATS), 16) + element_E, x_E)
    else:
        tl.store(address.to(_FLOATS) + element_E, x_E, mask=inside_E)


@triton.jit
def _pass(
    parameters, gradients, moments, squares, averages, element_E, inside_E, scale, average_weight, lr, eps, decay,
    correction1, correction2, BETA1: tl.constexpr, BETA2: tl.constexpr, AVERAGED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    p_E = _load(parameters, element_E, inside_E, WHOLE)
    g_E = scale * _load(gradients, element_E, inside_E, WHOLE)
    m_E = _load(moments, element_E, inside_E, WHOLE)
    v_E = _load(squares, element_E, inside_E, WHOLE)
    p_E -= lr * decay * p_E
    m_E += (1 - BETA1) * (g_E - m_E)
    v_E = BETA2 * v_E + (1 - BETA2) * g_E * g_E
    p_E -= (lr / correction1) * m_E / (tl.sqrt_rn(v_E) / correction2 + eps)
    _store(parameters, element_E, p_E, inside_E, WHOLE)
    _store(moments, element_E, m_E, inside_E, WHOLE)
    _store(squares, element_E, v_E, inside_E, WHOLE)
    if AVERAGED:
        a_E = _load(averages, element_E, inside_E, WHOLE)
        _store(averages, element_E, a_E + average_weight * (p_E - a_E), inside_E, WHOLE)


@triton.jit
def _adamw(
    table, step, scales, applied, n, average_weight, lr, eps, decay,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, HALVINGS: tl.constexpr,
    AVERAGED: tl.constexpr, SCALED: tl.constexpr, GUARDED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    if GUARDED:
        skips = tl.load(applied) == 0
        if skips:
            return
    program = tl.program_id(0)
    column, end = 0, n
    for _ in range(HALVINGS):  # the last column whose first program is not behind this one
        middle = (column + end) // 2
        mine = _place(table, n, 6, middle) <= program
        column, end = tl.where(mine, middle, column), tl.where(mine, end, middle)
    first = (program - _place(table, n, 6, column)) * BLOCK_E
    left = _place(table, n, 5, column) - first

    steps = tl.load(step).to(tl.float64) + 1
    correction1 = (1 - tl.exp2(steps * LOG_BETA1)).to(tl.float32)
    correction2 = tl.sqrt((1 - tl.exp2(steps * LOG_BETA2)).to(tl.float32))
    scale = 1.0
    if SCALED == 1:
        scale = tl.load(scales)
    if SCALED == 2:
        scale = tl.load(scales + column)

    parameters = _place(table, n, 0, column) + 4 * first
    gradients = _place(table, n, 1, column) + 4 * first
    moments = _place(table, n, 2, column) + 4 * first
    squares = _place(table, n, 3, column) + 4 * first
    averages = _place(table, n, 4, column) + 4 * first
    element_E = tl.arange(0, BLOCK_E)
    # gradients may lie in the buckets of DDP, where only 4 bytes divide their addresses
    if ((parameters | gradients | moments | squares | averages) & 15) + (left < BLOCK_E) == 0:
        _pass(
            parameters, gradients, moments, squares, averages, element_E, None, scale, average_weight, lr, eps, decay,
            correction1, correction2, BETA1, BETA2, AVERAGED, True,
        )  # fmt: skip
    else:
        _pass(
            parameters, gradients, moments, squares, averages, element_E, element_E < left, scale, average_weight, lr, eps,
            decay, correction1, correction2, BETA1, BETA2, AVERAGED, False,
        )  # fmt: skip


def step(given: Step) -> None:
    """See `kernels.adamw`. ValueError for fp64."""
    if given.parameters[0].dtype != torch.float32:
        raise ValueError(f"adamw's Triton pass takes float32, got {given.parameters[0].dtype}; use reference")
    step, scales, applied = given.step, given.scales, given.applied
    lists = [given.parameters, given.gradients, given.moments, given.squares, given.averages or given.parameters]
    addresses = [[x.data_ptr() for x in tensors] for tensors in lists]
    sizes = [x.numel() for x in given.parameters]
    firsts, programs = [], 0
    for size in sizes:
        firsts.append(programs)
        programs += triton.cdiv(size, _BLOCK)
    if not programs:
        return
    rows = torch.tensor([*addresses, sizes, firsts], pin_memory=step.is_cuda)
    table = rows.to(step.device, non_blocking=True)
    with torch.cuda.device_of(step):
        _adamw[(programs,)](
            table, step, scales if scales is not None else step, applied if applied is not None else step, len(sizes),
            given.average_weight, given.lr, given.eps, given.weight_decay, BETA1=given.beta1, BETA2=given.beta2,
            LOG_BETA1=_log2(given.beta1), LOG_BETA2=_log2(given.beta2), HALVINGS=len(sizes).bit_length(),
            AVERAGED=bool(given.averages), SCALED=0 if scales is None else 1 + scales.ndim,
            GUARDED=applied is not None, BLOCK_E=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


def variants(capability: int) -> list[Variant]:
    """A ViT-L's 296 tensors: alone, clipped together or each, and followed by an average."""
    pointers = {"table": "*i64", "step": "*fp32", "scales": "*fp32", "applied": "*i1"}
    kinds = pointers | {"n": "i32"}
    found = []
    for title, averaged, scaled in (
        ("alone", False, 0),
        ("clipped, averaged", True, 1),
        ("clipped each, averaged", True, 2),
    ):
        constants = {"BETA1": 0.9, "BETA2": 0.95, "LOG_BETA1": _log2(0.9), "LOG_BETA2": _log2(0.95), "HALVINGS": 9}
        constants |= {"AVERAGED": averaged, "SCALED": scaled, "GUARDED": True, "BLOCK_E": _BLOCK}
        signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in _adamw.arg_names}
        found.append(Variant(title, _adamw, signature, constants, _WARPS, 3, (*pointers,), matrix=False))
    return found

"""Sinkhorn-Knopp assignment of samples to prototypes, and the cross-entropy of a student against it.

B rows (samples) of this process, K prototypes.

The published loop divides exp(scores / T) by its total, then alternately by prototype and by sample sums. Totals, 1/K
and 1/B cancel, so all it finds are two vectors: Q = exp(scores / T + log_u[K] + log_v[B]). Only these are kept here, as
logarithms, which no score can overflow; a shift per sample, the usual remedy, would change the result of a few
iterations.

Why ops: the compiler makes each half-iteration a pass of its own over [B, K]; published code moves 162 bytes per
element from 16-bit scores in 24 reads and 17 writes. Normalising rows and summing columns for the next iteration fit in
one pass, so `iterations + 1` reads are enough, 8 bytes per element for 3, plus one write where Q itself is wanted. The
last step normalises rows, so Q is softmax((scores - centre) / T) with centre = -T log_u: `soft_cross_entropy` forms it as
it reads the scores and the student's logits, and Q is never stored.

Every implementation is a module with these functions (wide: fp64 for fp64 scores, else fp32):
    sweep(scores, log_u | None, temperature) -> column_lse[K], the log-sum-exp over rows of scores / T + log_v, where
        log_v normalises each row of exp(scores / T + log_u); None starts from log_v = 0
    assign(scores, log_u, temperature) -> wide Q[B,K], rows normalised
and may have
    balance(scores, temperature, iterations) -> -log_u, but for a number that is free, all sweeps of one process at once
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.checks import DTYPES
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of
from kernels.soft_cross_entropy import cost as cross_entropy_cost
from kernels.soft_cross_entropy import soft_cross_entropy

torch.library.define(
    "tessera::sinkhorn_sweep", "(Tensor scores, Tensor? log_u, float temperature, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::sinkhorn_balance", "(Tensor scores, float temperature, int iterations, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::sinkhorn_assign", "(Tensor scores, Tensor log_u, float temperature, str implementation) -> Tensor"
)


def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None) -> Tensor:
    """Soft assignment of samples to prototypes in which every prototype is used equally; no gradient flows.

    Each iteration normalises prototypes over all samples, then samples over all prototypes. Source: Caron et al.,
    Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV), 2020, section 3.1; centring of
    Oquab et al., DINOv2, 2023, section 4.

    Args:
        scores: [B, K], fp16, bf16, fp32 or fp64, of any size that its dtype can hold.
        temperature: a positive number.
        iterations: at least 1.
        group: ranks whose rows are balanced together, each with its own B, which may be 0; None is this process alone.

    Returns:
        fp32 [B, K] (fp64 for fp64 scores); rows sum to 1.

    Raises:
        ValueError: for a shape, dtype, temperature or number of iterations that is not the above.
    """
    _check("sinkhorn", scores, iterations, temperature=temperature)
    scores = scores.detach()
    log_u = _balance(scores, float(temperature), iterations, group)
    implementation = chosen("sinkhorn", scores.device, "sinkhorn_assign", _shape_class(scores))
    return torch.ops.tessera.sinkhorn_assign(scores, log_u, float(temperature), implementation)


def sinkhorn_centre(
    scores: Tensor, temperature: float, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """What to take from each prototype's scores so that softmax((scores - centre) / temperature) is what `sinkhorn`
    returns; no gradient flows. Each iteration reads the scores once.

    Source: as for `sinkhorn`; the last step of an iteration normalises rows, as a softmax does.

    Args:
        scores: [B, K] as for `sinkhorn`.
        temperature: see `sinkhorn`.
        iterations: see `sinkhorn`.
        group: see `sinkhorn`.

    Returns:
        fp32 [K] (fp64 for fp64 scores), of mean 0, the same on all ranks of the group.

    Raises:
        ValueError: for a shape, dtype, temperature or number of iterations that is not the above.
    """
    _check("sinkhorn_centre", scores, iterations, temperature=temperature)
    return -float(temperature) * _balance(scores.detach(), float(temperature), iterations, group)


def sinkhorn_cross_entropy(
    teacher_scores: Tensor,
    student_logits: Tensor,
    teacher_temperature: float,
    student_temperature: float,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over rows of -sum_k Q log softmax(student_logits / student_temperature), with Q = sinkhorn(teacher_scores).

    Args:
        teacher_scores: [B, K] as for `sinkhorn`; Q is never stored.
        student_logits: [B, K], fp16, bf16, fp32 or fp64, on the device of teacher_scores.
        teacher_temperature: a positive number, for Q.
        student_temperature: a positive number, for the softmax of the student.
        iterations: see `sinkhorn`.
        group: see `sinkhorn`.

    Returns:
        Scalar, the mean over the rows of this process (0 for none), in fp64 where an input is, else fp32.
        Differentiable in student_logits, once, and in nothing else.

    Raises:
        ValueError: for a shape, dtype, device, temperature or number of iterations that is not the above.
    """
    temperatures = {"teacher_temperature": teacher_temperature, "student_temperature": student_temperature}
    _check("sinkhorn_cross_entropy", teacher_scores, iterations, **temperatures)
    if (
        student_logits.shape != teacher_scores.shape
        or student_logits.device != teacher_scores.device
        or student_logits.dtype not in DTYPES
    ):
        raise ValueError(
            f"sinkhorn_cross_entropy needs student_logits of shape {list(teacher_scores.shape)} in float16, bfloat16, "
            f"float32 or float64 on {teacher_scores.device}, got {student_logits.dtype} "
            f"{list(student_logits.shape)} on {student_logits.device}"
        )
    centre = sinkhorn_centre(teacher_scores, teacher_temperature, iterations, group)
    return soft_cross_entropy(teacher_scores, student_logits, teacher_temperature, student_temperature, centre)


def cost(rows: int, prototypes: int, element_size: int, iterations: int = 3) -> tuple[Cost, Cost, Cost]:
    """Floor of sinkhorn, and of sinkhorn_cross_entropy forward and backward, with scores and logits of one element
    size.

    Flops count an exponential as one: three per element and sweep, and what `soft_cross_entropy` counts.
    """
    elements = rows * prototypes
    sweeps = Cost(iterations * element_size * elements, 3 * iterations * elements)
    assign = Cost(sweeps.bytes + (element_size + 4) * elements, sweeps.flops + 3 * elements)
    forward, backward = cross_entropy_cost(rows, rows, prototypes, element_size)
    return assign, Cost(sweeps.bytes + forward.bytes, sweeps.flops + forward.flops), backward


def _balance(scores: Tensor, temperature: float, iterations: int, group) -> Tensor:
    """log_u[K], the scale of each prototype before the last row normalisation; the same on all ranks."""
    implementation = chosen("sinkhorn", scores.device, "sinkhorn_balance", _shape_class(scores))
    if group is None:
        return torch.ops.tessera.sinkhorn_balance(scores, temperature, iterations, implementation)
    log_u = None
    for _ in range(iterations):
        column_lse = torch.ops.tessera.sinkhorn_sweep(scores, log_u, temperature, implementation)
        top = column_lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        total = (column_lse - top).exp()
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        log_u = _equalised(top + total.log())
    return log_u


def _equalised(column_lse: Tensor) -> Tensor:
    """log_u under which all columns have one sum. Its mean is 0: it would grow by log(K / B) at each iteration, and lose
    digits, were that sum 1."""
    return column_lse.mean() - column_lse


def _check(op: str, scores: Tensor, iterations: int, **temperatures: float) -> None:
    if scores.ndim != 2 or scores.shape[1] < 1 or scores.dtype not in DTYPES:
        raise ValueError(
            f"{op} needs scores [rows, prototypes] in float16, bfloat16, float32 or float64, "
            f"got {scores.dtype} {list(scores.shape)}"
        )
    if iterations < 1:
        raise ValueError(f"{op} needs at least 1 iteration, got {iterations}")
    for name, temperature in temperatures.items():
        if not temperature > 0:
            raise ValueError(f"{op} needs a positive {name}, got {temperature}")


def _shape_class(scores: Tensor, *_: object) -> str:
    return f"{name_of(scores.dtype)} K{scores.shape[1]}"


@implement("tessera::sinkhorn_sweep")
def _sweep(scores, log_u, temperature, implementation):
    return load("sinkhorn", implementation).sweep(scores, log_u, temperature)


@implement("tessera::sinkhorn_balance", _shape_class)
def _balance_alone(scores, temperature, iterations, implementation):
    module = load("sinkhorn", implementation)
    if hasattr(module, "balance"):
        return _equalised(module.balance(scores, temperature, iterations))
    log_u = None
    for _ in range(iterations):
        log_u = _equalised(module.sweep(scores, log_u, temperature))
    return log_u


@implement("tessera::sinkhorn_assign", _shape_class)
def _assign(scores, log_u, temperature, implementation):
    return load("sinkhorn", implementation).assign(scores, log_u, temperature)


@torch.library.register_fake("tessera::sinkhorn_sweep")
def _sweep_fake(scores, log_u, temperature, implementation):
    return scores.new_empty(scores.shape[1], dtype=_wide(scores))


@torch.library.register_fake("tessera::sinkhorn_balance")
def _balance_fake(scores, temperature, iterations, implementation):
    return scores.new_empty(scores.shape[1], dtype=_wide(scores))


@torch.library.register_fake("tessera::sinkhorn_assign")
def _assign_fake(scores, log_u, temperature, implementation):
    return scores.new_empty(scores.shape, dtype=_wide(scores))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

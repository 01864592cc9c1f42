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

Every implementation but plain is a module with these functions (wide: fp64 for fp64 scores, else fp32):
    sweep(scores, log_u | None, temperature) -> column_lse[K], the log-sum-exp over rows of scores / T + log_v, where
        log_v normalises each row of exp(scores / T + log_u); None starts from log_v = 0
    assign(scores, log_u, temperature) -> wide Q[B,K], rows normalised
and may have
    balance(scores, temperature, iterations) -> -log_u, but for a number that is free, all sweeps of one process at once
Plain, which the compiler sees through, has sweep and, with what the ops of these names take and return, sinkhorn_balance and
sinkhorn_assign.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.checks import DTYPES, check_temperature
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of
from kernels.soft_cross_entropy import cost as cross_entropy_cost
from kernels.soft_cross_entropy import met_by, soft_cross_entropy

torch.library.define(
    "tessera::sinkhorn_sweep", "(Tensor scores, Tensor? log_u, float temperature, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::sinkhorn_balance", "(Tensor scores, float temperature, int iterations, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::sinkhorn_assign", "(Tensor scores, Tensor log_u, float temperature, str implementation) -> Tensor"
)


def sinkhorn(
    scores: Tensor, temperature: float | Tensor, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Soft assignment of samples to prototypes in which every prototype is used equally; no gradient flows.

    Each iteration normalises prototypes over all samples, then samples over all prototypes. Source: Caron et al.,
    Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV), 2020, section 3.1; centring of
    Oquab et al., DINOv2, 2023, section 4.

    Args:
        scores: [B, K], fp16, bf16, fp32 or fp64, of any size that its dtype can hold.
        temperature: a positive number; where plain runs also a tensor [], trusted to hold one, which compiled code takes as an
            input while a number becomes part of it.
        iterations: at least 1.
        group: ranks whose rows are balanced together, each with its own B, which may be 0; None is this process alone.

    Returns:
        fp32 [B, K] (fp64 for fp64 scores); rows sum to 1.

    Raises:
        ValueError: for a shape, dtype, temperature or number of iterations that is not the above.
    """
    _check("sinkhorn", scores, iterations, temperature)
    implementation = chosen("sinkhorn", scores.device, "sinkhorn_assign", _shape_class(scores))
    check_temperature("sinkhorn", "temperature", temperature, implementation)
    scores, temperature = scores.detach(), _taken(temperature)
    log_u = _balance(scores, temperature, iterations, group)
    if implementation == "plain":
        return load("sinkhorn", "plain").sinkhorn_assign(scores, log_u, temperature)
    return torch.ops.tessera.sinkhorn_assign(scores, log_u, temperature, implementation)


def sinkhorn_centre(
    scores: Tensor, temperature: float | Tensor, iterations: int = 3, group: dist.ProcessGroup | None = None
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
    _check("sinkhorn_centre", scores, iterations, temperature)
    temperature = _taken(temperature)
    return -temperature * _balance(scores.detach(), temperature, iterations, group)


def sinkhorn_cross_entropy(
    teacher_scores: Tensor,
    student_logits: Tensor,
    teacher_temperature: float | Tensor,
    student_temperature: float | Tensor,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over rows of -sum_k Q log softmax(student_logits / student_temperature), with Q = sinkhorn(teacher_scores).

    Args:
        teacher_scores: [B, K] as for `sinkhorn`; Q is never stored.
        student_logits: [B, K], fp16, bf16, fp32 or fp64, on the device of teacher_scores.
        teacher_temperature: as for `sinkhorn`, for Q.
        student_temperature: as for `soft_cross_entropy`, for the softmax of the student.
        iterations: see `sinkhorn`.
        group: see `sinkhorn`.

    Returns:
        Scalar, the mean over the rows of this process (0 for none), in fp64 where an input is, else fp32.
        Differentiable in student_logits, once, and in nothing else.

    Raises:
        ValueError: for a shape, dtype, device, temperature or number of iterations that is not the above.
    """
    _check("sinkhorn_cross_entropy", teacher_scores, iterations, teacher_temperature, "teacher_temperature")
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
    loss_by = met_by(teacher_scores, student_logits)
    check_temperature("sinkhorn_cross_entropy", "student_temperature", student_temperature, loss_by)
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


def balanced_by(scores: Tensor) -> str:
    """The implementation that finds the centre of these scores; of their shape and dtype only."""
    return chosen("sinkhorn", scores.device, "sinkhorn_balance", _shape_class(scores))


def _balance(scores: Tensor, temperature: float | Tensor, iterations: int, group: dist.ProcessGroup | None) -> Tensor:
    """log_u[K], the scale of each prototype before the last row normalisation; the same on all ranks."""
    implementation = balanced_by(scores)
    plain = implementation == "plain"
    if group is None and plain:
        return load("sinkhorn", "plain").sinkhorn_balance(scores, temperature, iterations)
    if group is None:
        return torch.ops.tessera.sinkhorn_balance(scores, temperature, iterations, implementation)
    log_u = None
    for _ in range(iterations):
        if plain:
            column_lse = load("sinkhorn", "plain").sweep(scores, log_u, temperature)
        else:
            column_lse = torch.ops.tessera.sinkhorn_sweep(scores, log_u, temperature, implementation)
        log_u = _equalised(_over_ranks(column_lse, group))
    return log_u


def _over_ranks(column_lse: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The log-sum-exp of the columns of all ranks' rows."""
    top = column_lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    total = (column_lse - top).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return top + total.log()


def _taken(temperature: float | Tensor) -> float | Tensor:
    """As ops take it, of which only plain's also takes a tensor."""
    return temperature.detach() if isinstance(temperature, Tensor) else float(temperature)


def _equalised(column_lse: Tensor) -> Tensor:
    """log_u under which all columns have one sum. Its mean is 0: it would grow by log(K / B) at each iteration, and lose
    digits, were that sum 1."""
    return column_lse.mean() - column_lse


def _check(op: str, scores: Tensor, iterations: int, temperature: float | Tensor, name: str = "temperature") -> None:
    if scores.ndim != 2 or scores.shape[1] < 1 or scores.dtype not in DTYPES:
        raise ValueError(
            f"{op} needs scores [rows, prototypes] in float16, bfloat16, float32 or float64, "
            f"got {scores.dtype} {list(scores.shape)}"
        )
    if iterations < 1:
        raise ValueError(f"{op} needs at least 1 iteration, got {iterations}")
    check_temperature(op, name, temperature, balanced_by(scores))


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

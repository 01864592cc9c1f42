"""Sinkhorn-Knopp assignment of samples to prototypes, and the cross-entropy of a student against it.

B rows (samples) of this process, K prototypes.

The published loop divides exp(scores / T) by its total, then alternately by prototype and by sample sums. Totals, 1/K
and 1/B cancel, so all it finds are two vectors: Q = exp(scores / T + log_u[K] + log_v[B]). Only these are kept here, as
logarithms, which no score can overflow; a shift per sample, the usual remedy, would change the result of a few
iterations.

Why ops: the compiler makes each half-iteration a pass of its own over [B, K]; published code moves 162 bytes per
element from 16-bit scores in 24 reads and 17 writes. Normalising rows and summing columns for the next iteration fit in
one pass, so `iterations + 1` reads are enough, 8 bytes per element for 3, plus one write where Q itself is wanted. The
last pass can meet the student's logits at once, so targets are never stored.

Every implementation is a module with these functions (wide: fp64 for fp64 scores, else fp32):
    sweep(scores, log_u | None, temperature) -> column_lse[K], the log-sum-exp over rows of scores / T + log_v, where
        log_v normalises each row of exp(scores / T + log_u); None starts from log_v = 0
    assign(scores, log_u, temperature) -> wide Q[B,K], rows normalised
    cross_entropy_forward(scores, log_u, student_logits, temperature, student_temperature)
        -> (loss, target_rows[2,B], student_rows[2,B]): of each row of scores / T + log_u and of student_logits / T the
        largest entry and the sum of exp(entry - largest); kept apart, for their sum as one logarithm would round away
        what exp(20 / 0.1) needs
    cross_entropy_backward(grad_loss, scores, log_u, student_logits, target_rows, student_rows, temperature,
        student_temperature) -> grad_student_logits
and may have
    balance(scores, temperature, iterations) -> log_u, all sweeps of one process at once
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.choice import chosen, load
from kernels.cost import Cost

torch.library.define(
    "tessera::sinkhorn_sweep", "(Tensor scores, Tensor? log_u, float temperature, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::sinkhorn_balance", "(Tensor scores, float temperature, int iterations, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::sinkhorn_assign", "(Tensor scores, Tensor log_u, float temperature, str implementation) -> Tensor"
)
torch.library.define(
    "tessera::sinkhorn_cross_entropy_forward",
    "(Tensor scores, Tensor log_u, Tensor student_logits, float temperature, float student_temperature,"
    " str implementation) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "tessera::sinkhorn_cross_entropy_backward",
    "(Tensor grad_loss, Tensor scores, Tensor log_u, Tensor student_logits, Tensor target_rows, Tensor student_rows,"
    " float temperature, float student_temperature, str implementation) -> Tensor",
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
    implementation = chosen("sinkhorn", scores.device)
    scores = scores.detach()
    log_u = _balance(scores, float(temperature), iterations, group, implementation)
    return torch.ops.tessera.sinkhorn_assign(scores, log_u, float(temperature), implementation)


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
        or not student_logits.is_floating_point()
    ):
        raise ValueError(
            f"sinkhorn_cross_entropy needs floating student_logits of shape {list(teacher_scores.shape)} on "
            f"{teacher_scores.device}, got {student_logits.dtype} {list(student_logits.shape)} "
            f"on {student_logits.device}"
        )
    implementation = chosen("sinkhorn", teacher_scores.device)
    scores, temperature = teacher_scores.detach(), float(teacher_temperature)
    log_u = _balance(scores, temperature, iterations, group, implementation)
    return torch.ops.tessera.sinkhorn_cross_entropy_forward(
        scores, log_u, student_logits, temperature, float(student_temperature), implementation
    )[0]


def cost(rows: int, prototypes: int, element_size: int, iterations: int = 3) -> tuple[Cost, Cost, Cost]:
    """Floor of sinkhorn, and of sinkhorn_cross_entropy forward and backward, with scores and logits of one element
    size.

    Flops count an exponential as one: three per element and pass.
    """
    elements = rows * prototypes
    passes = iterations + 1
    assign = Cost((passes * element_size + 4) * elements, 3 * passes * elements)
    forward = Cost((passes + 1) * element_size * elements, (3 * passes + 5) * elements)
    backward = Cost(3 * element_size * elements, 8 * elements)
    return assign, forward, backward


def _balance(scores: Tensor, temperature: float, iterations: int, group, implementation: str) -> Tensor:
    """log_u[K], the scale of each prototype before the last row normalisation; the same on all ranks."""
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
    if scores.ndim != 2 or scores.shape[1] < 1 or not scores.is_floating_point():
        raise ValueError(
            f"{op} needs floating scores of shape [rows, prototypes], got {scores.dtype} {list(scores.shape)}"
        )
    if iterations < 1:
        raise ValueError(f"{op} needs at least 1 iteration, got {iterations}")
    for name, temperature in temperatures.items():
        if not temperature > 0:
            raise ValueError(f"{op} needs a positive {name}, got {temperature}")


@torch.library.impl("tessera::sinkhorn_sweep", "CompositeExplicitAutograd")
def _sweep(scores, log_u, temperature, implementation):
    return load("sinkhorn", implementation).sweep(scores, log_u, temperature)


@torch.library.impl("tessera::sinkhorn_balance", "CompositeExplicitAutograd")
def _balance_alone(scores, temperature, iterations, implementation):
    module = load("sinkhorn", implementation)
    if hasattr(module, "balance"):
        return module.balance(scores, temperature, iterations)
    log_u = None
    for _ in range(iterations):
        log_u = _equalised(module.sweep(scores, log_u, temperature))
    return log_u


@torch.library.impl("tessera::sinkhorn_assign", "CompositeExplicitAutograd")
def _assign(scores, log_u, temperature, implementation):
    return load("sinkhorn", implementation).assign(scores, log_u, temperature)


@torch.library.impl("tessera::sinkhorn_cross_entropy_forward", "CompositeExplicitAutograd")
def _cross_entropy_forward(scores, log_u, student_logits, temperature, student_temperature, implementation):
    forward = load("sinkhorn", implementation).cross_entropy_forward
    return forward(scores, log_u, student_logits, temperature, student_temperature)


@torch.library.impl("tessera::sinkhorn_cross_entropy_backward", "CompositeExplicitAutograd")
def _cross_entropy_backward(grad_loss, scores, log_u, student_logits, target_rows, student_rows, *plain):
    *temperatures, implementation = plain
    backward = load("sinkhorn", implementation).cross_entropy_backward
    return backward(grad_loss, scores, log_u, student_logits, target_rows, student_rows, *temperatures)


@torch.library.register_fake("tessera::sinkhorn_sweep")
def _sweep_fake(scores, log_u, temperature, implementation):
    return scores.new_empty(scores.shape[1], dtype=_wide(scores))


@torch.library.register_fake("tessera::sinkhorn_balance")
def _balance_fake(scores, temperature, iterations, implementation):
    return scores.new_empty(scores.shape[1], dtype=_wide(scores))


@torch.library.register_fake("tessera::sinkhorn_assign")
def _assign_fake(scores, log_u, temperature, implementation):
    return scores.new_empty(scores.shape, dtype=_wide(scores))


@torch.library.register_fake("tessera::sinkhorn_cross_entropy_forward")
def _cross_entropy_forward_fake(scores, log_u, student_logits, temperature, student_temperature, implementation):
    rows = scores.shape[0]
    loss = scores.new_empty((), dtype=torch.promote_types(_wide(scores), _wide(student_logits)))
    return loss, scores.new_empty(2, rows, dtype=_wide(scores)), scores.new_empty(2, rows, dtype=_wide(student_logits))


@torch.library.register_fake("tessera::sinkhorn_cross_entropy_backward")
def _cross_entropy_backward_fake(grad_loss, scores, log_u, student_logits, target_rows, student_rows, *plain):
    return student_logits.new_empty(student_logits.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _save(ctx, inputs, output):
    scores, log_u, student_logits, temperature, student_temperature, implementation = inputs
    _, target_rows, student_rows = output
    ctx.save_for_backward(scores, log_u, student_logits, target_rows, student_rows)
    ctx.plain = (temperature, student_temperature, implementation)
    ctx.mark_non_differentiable(target_rows, student_rows)


def _differentiate(ctx, grad_loss, _grad_target_rows, _grad_student_rows):
    grad = torch.ops.tessera.sinkhorn_cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.plain)
    return None, None, grad, None, None, None


torch.library.register_autograd("tessera::sinkhorn_cross_entropy_forward", _differentiate, setup_context=_save)

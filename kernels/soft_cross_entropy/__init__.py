"""Cross-entropy of a student against a centred, sharpened teacher over many prototypes, without storing a distribution.

G teacher rows, B student rows, K prototypes, V teacher rows that a student row meets.

Why ops: written plainly, teacher and student become fp32 distributions [B, K], and every step between logits and loss
is a pass of its own: 64 bytes per pair of 16-bit logits forward, 30 backward. Compiled, the distributions still meet in
memory, for a softmax over 65,536 prototypes is more than one pass and the student's is kept for backward. Here forward
reads each row once and keeps two numbers of it; backward reads again, forms both distributions from these and writes
the gradient: 4 bytes and 6. In multi-crop training two teacher rows meet ten student rows, in 18 pairs: indices name
them, so that no teacher row is copied and no student row read or differentiated twice. A teacher row that is named has
its two numbers taken first, which is one more read of the few teacher rows.

Every implementation but plain is a module with these two functions (wide: fp64 for fp64 logits, else fp32; vectors and indices
are contiguous):
    forward(teacher_logits, student_logits, centre | None, teacher_rows[B,V] | None, weights | None,
        teacher_temperature, student_temperature)
        -> (loss, teacher_sums[2,G], student_sums[2,B]): of each row of teacher_logits - centre and of student_logits
        the largest entry and the sum of exp((entry - largest) / temperature), each wide; kept apart, for their sum as one
        logarithm would round away what exp(20 / 0.04) needs
    backward(grad_loss, teacher_logits, student_logits, centre | None, teacher_rows[B,V] | None, weights | None,
        teacher_sums, student_sums, teacher_temperature, student_temperature) -> grad_student_logits
But for plain, which the compiler sees through: a function soft_cross_entropy of forward's arguments that returns the loss.
"""

import torch
from torch import Tensor

from kernels.checks import DTYPES, check_temperature, checks_values
from kernels.choice import chosen, load
from kernels.cost import Cost
from kernels.registration import implement, name_of

_INPUTS = "Tensor teacher_logits, Tensor student_logits, Tensor? centre, Tensor? teacher_rows, Tensor? weights"
_PLAIN = "float teacher_temperature, float student_temperature, str implementation"
torch.library.define("tessera::soft_cross_entropy_forward", f"({_INPUTS}, {_PLAIN}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "tessera::soft_cross_entropy_backward",
    f"(Tensor grad_loss, {_INPUTS}, Tensor teacher_sums, Tensor student_sums, {_PLAIN}) -> Tensor",
)


def soft_cross_entropy(
    teacher_logits: Tensor,
    student_logits: Tensor,
    teacher_temperature: float | Tensor,
    student_temperature: float | Tensor,
    centre: Tensor | None = None,
    weights: Tensor | None = None,
    teacher_rows: Tensor | None = None,
) -> Tensor:
    """Mean over student rows of -sum_k q_k log softmax(student_logits / student_temperature)_k, with
    q = softmax((teacher_logits - centre) / teacher_temperature) of the teacher row that belongs to it.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (DINO), 2021, section 3.1; over
    patches, Zhou et al., iBOT, 2022, section 3.2.

    Args:
        teacher_logits: [G, K], fp16, bf16, fp32 or fp64.
        student_logits: [B, K], in any of these dtypes, on the device of teacher_logits.
        teacher_temperature: a positive number; where plain runs also a tensor [], trusted to hold one, which compiled code
            takes as an input while a number becomes part of it.
        student_temperature: likewise.
        centre: fp32 [K], or fp64 with fp64 teacher_logits, taken from every teacher row; None takes nothing.
        weights: fp32 [B]; with them the result is sum(weights * row loss) instead of the mean.
        teacher_rows: int64 [B], the teacher row of each student row, or [B, V], of which the loss of a row is the sum
            of V cross-entropies; -1 stands for none. None pairs row with row, G = B. The values are checked on the CPU,
            and with TESSERA_DEBUG=1 in the environment on a GPU as well, which is waited for; otherwise a GPU trusts
            them, and so does compiled code of plain.

    Returns:
        Scalar (0 for no student rows), in fp64 where logits are, else fp32. Differentiable in student_logits, once, and in
        nothing else.

    Raises:
        ValueError: for a shape, dtype, device, temperature or teacher row that is not the above.
    """
    _check(teacher_logits, student_logits, centre, weights, teacher_rows)
    implementation = met_by(teacher_logits, student_logits, teacher_rows)
    temperatures = {"teacher_temperature": teacher_temperature, "student_temperature": student_temperature}
    for name, temperature in temperatures.items():
        check_temperature("soft_cross_entropy", name, temperature, implementation)
    centre, weights = (None if x is None else x.detach().contiguous() for x in (centre, weights))
    if teacher_rows is not None:
        teacher_rows = (teacher_rows[:, None] if teacher_rows.ndim == 1 else teacher_rows).contiguous()
    inputs = teacher_logits.detach(), student_logits, centre, teacher_rows, weights
    if implementation == "plain":
        _check_rows(teacher_logits, teacher_rows)
        return load("soft_cross_entropy", "plain").soft_cross_entropy(*inputs, *temperatures.values())
    plain = float(teacher_temperature), float(student_temperature), implementation
    return torch.ops.tessera.soft_cross_entropy_forward(*inputs, *plain)[0]


def met_by(teacher_logits: Tensor, student_logits: Tensor, teacher_rows: Tensor | None = None) -> str:
    """The implementation that runs for these; of their shapes and dtypes only."""
    shape_class = _shape_class(teacher_logits, student_logits, None, teacher_rows)
    return chosen("soft_cross_entropy", student_logits.device, "soft_cross_entropy_forward", shape_class)


def cost(
    teacher_rows: int, student_rows: int, prototypes: int, element_size: int, pairs: int | None = None
) -> tuple[Cost, Cost]:
    """Floor of forward and of backward, with logits of one element size; every row is read once in each.

    Flops count an exponential as one. `pairs` of a teacher row and a student row; None means one per student row.
    """
    pairs = student_rows if pairs is None else pairs
    forward = Cost(
        (teacher_rows + student_rows) * prototypes * element_size,
        (5 * teacher_rows + 4 * student_rows + 2 * pairs) * prototypes,
    )
    backward = Cost(
        (teacher_rows + 2 * student_rows) * prototypes * element_size,
        (5 * teacher_rows + 4 * student_rows + pairs) * prototypes,
    )
    return forward, backward


def _check(
    teacher_logits: Tensor,
    student_logits: Tensor,
    centre: Tensor | None,
    weights: Tensor | None,
    teacher_rows: Tensor | None,
) -> None:
    for name, x in {"teacher_logits": teacher_logits, "student_logits": student_logits}.items():
        if x.ndim != 2 or x.shape[1] < 1 or x.dtype not in DTYPES:
            raise ValueError(
                f"soft_cross_entropy needs {name} [rows, prototypes] in float16, bfloat16, float32 or float64, "
                f"got {x.dtype} {list(x.shape)}"
            )
    (teachers, prototypes), students = teacher_logits.shape, len(student_logits)
    if student_logits.shape[1] != prototypes:
        raise ValueError(
            f"soft_cross_entropy needs as many prototypes in both logits, got {list(teacher_logits.shape)} and "
            f"{list(student_logits.shape)}"
        )
    if teacher_rows is None:
        if teachers != students:
            raise ValueError(
                f"soft_cross_entropy needs teacher_rows where logits have different rows, got {teachers} and {students}"
            )
    elif (
        teacher_rows.dtype != torch.int64
        or teacher_rows.ndim not in (1, 2)
        or len(teacher_rows) != students
        or 0 in teacher_rows.shape[1:]
    ):
        raise ValueError(
            f"soft_cross_entropy needs teacher_rows as int64 [{students}] or [{students}, V], "
            f"got {teacher_rows.dtype} {list(teacher_rows.shape)}"
        )
    elif students and not teachers:
        raise ValueError("soft_cross_entropy needs a teacher row where there are student rows, got none")
    wide = teacher_logits.dtype == torch.float64
    if centre is not None and (
        centre.shape != (prototypes,) or centre.dtype not in (torch.float32, *[torch.float64] * wide)
    ):
        raise ValueError(
            f"soft_cross_entropy needs centre as fp32{' or fp64' * wide} [{prototypes}], "
            f"got {centre.dtype} {list(centre.shape)}"
        )
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != (students,)):
        raise ValueError(
            f"soft_cross_entropy needs weights as fp32 [{students}], got {weights.dtype} {list(weights.shape)}"
        )
    devices = {x.device for x in (teacher_logits, student_logits, centre, weights, teacher_rows) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            f"soft_cross_entropy needs one device for all inputs, got {' and '.join(sorted(map(str, devices)))}"
        )


def _shape_class(teacher: Tensor, student: Tensor, centre: Tensor | None, rows: Tensor | None, *_: object) -> str:
    """Both dtypes, prototypes, and whether teacher rows are named."""
    return f"{name_of(teacher.dtype)} {name_of(student.dtype)} K{student.shape[1]}" + " rows" * (rows is not None)


def _check_rows(teacher_logits: Tensor, teacher_rows: Tensor | None) -> None:
    if teacher_rows is not None and checks_values(teacher_rows.device) and len(teacher_rows):
        last, (low, high) = len(teacher_logits) - 1, (int(bound) for bound in teacher_rows.aminmax())
        if low < -1 or high > last:
            raise ValueError(
                f"soft_cross_entropy needs teacher_rows between -1 and {last}, got {low if low < -1 else high}"
            )


@implement("tessera::soft_cross_entropy_forward", _shape_class)
def _forward(teacher_logits, student_logits, centre, teacher_rows, weights, *plain):
    *temperatures, implementation = plain
    _check_rows(teacher_logits, teacher_rows)
    forward = load("soft_cross_entropy", implementation).forward
    return forward(teacher_logits, student_logits, centre, teacher_rows, weights, *temperatures)


@implement("tessera::soft_cross_entropy_backward")
def _backward(grad_loss, *inputs):
    *tensors_and_temperatures, implementation = inputs
    return load("soft_cross_entropy", implementation).backward(grad_loss, *tensors_and_temperatures)


@torch.library.register_fake("tessera::soft_cross_entropy_forward")
def _forward_fake(teacher_logits, student_logits, centre, teacher_rows, weights, *plain):
    wide, student_wide = _wide(teacher_logits), _wide(student_logits)
    loss = student_logits.new_empty((), dtype=torch.promote_types(wide, student_wide))
    teacher_sums = teacher_logits.new_empty(2, teacher_logits.shape[0], dtype=wide)
    return loss, teacher_sums, student_logits.new_empty(2, student_logits.shape[0], dtype=student_wide)


@torch.library.register_fake("tessera::soft_cross_entropy_backward")
def _backward_fake(grad_loss, teacher_logits, student_logits, *rest):
    return student_logits.new_empty(student_logits.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _save(ctx, inputs, output):
    *tensors, teacher_temperature, student_temperature, implementation = inputs
    _, *sums = output
    ctx.save_for_backward(*tensors, *sums)
    ctx.plain = (teacher_temperature, student_temperature, implementation)
    ctx.mark_non_differentiable(*sums)


def _differentiate(ctx, grad_loss, _grad_teacher_sums, _grad_student_sums):
    grad = torch.ops.tessera.soft_cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.plain)
    return None, grad, None, None, None, None, None, None


torch.library.register_autograd("tessera::soft_cross_entropy_forward", _differentiate, setup_context=_save)

"""Soft cross-entropy in plain torch, for the compiler to fuse: no op of ours, the whole matrix at once.

Both passes are written out. Left to autograd, backward would sum over the prototypes once more, for it does not know that
a target sums to 1. Only the sums of the rows are kept; backward forms both distributions from these again.

G teacher rows, B student rows, K prototypes, V teacher rows of a student row.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.registration import without_autocast


def soft_cross_entropy(
    teacher_GK: Tensor,
    student_BK: Tensor,
    centre_K: Tensor | None,
    teacher_rows_BV: Tensor | None,
    weights_B: Tensor | None,
    teacher_temperature: float | Tensor,
    student_temperature: float | Tensor,
) -> Tensor:
    """See `kernels.soft_cross_entropy`; differentiable in student_BK."""
    return _SoftCrossEntropy.apply(
        teacher_GK, student_BK, centre_K, teacher_rows_BV, weights_B, teacher_temperature, student_temperature
    )


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx, teacher_GK, student_BK, centre_K, teacher_rows_BV, weights_B, teacher_temperature, student_temperature
    ):
        teacher_sums = _sums(teacher_GK, centre_K, teacher_temperature)
        student_sums = _sums(student_BK, None, student_temperature)
        y_BK = _logits(student_BK, None, student_sums[0], student_temperature)
        met_B = 0
        for teacher, sums, meets in _teachers(teacher_GK, teacher_rows_BV, teacher_sums):
            # divided after the sum over prototypes, which so need not wait for another one
            met_R = (_logits(teacher, centre_K, sums[0], teacher_temperature).exp() * y_BK).sum(1) / sums[1]
            met_B = met_B + (met_R if meets is None else torch.where(meets, met_R, 0))
        losses_B = _pairs(student_sums[1], teacher_rows_BV) * student_sums[1].log() - met_B
        ctx.save_for_backward(
            teacher_GK, student_BK, centre_K, teacher_rows_BV, weights_B, *teacher_sums, *student_sums
        )
        ctx.temperatures = teacher_temperature, student_temperature
        return losses_B.sum() / max(len(losses_B), 1) if weights_B is None else (weights_B * losses_B).sum()

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_loss):
        teacher_GK, student_BK, centre_K, teacher_rows_BV, weights_B, *sums = ctx.saved_tensors
        teacher_temperature, student_temperature = ctx.temperatures
        teacher_sums, student_sums = sums[:2], sums[2:]
        pairs_B = _pairs(student_sums[1], teacher_rows_BV)
        share = grad_loss / student_temperature
        share_B = share / max(len(pairs_B), 1) if weights_B is None else share * weights_B.to(share.dtype)
        # Every factor has the incoming gradient in it before two matrices meet: what does not depend on it, the compiler may
        # form in forward and keep, and p - q is one matrix where the logits are two.
        grad_BK = _logits(student_BK, None, student_sums[0], student_temperature).exp()
        grad_BK = grad_BK * (share_B * pairs_B / student_sums[1])[:, None]
        for teacher, sums_of, meets in _teachers(teacher_GK, teacher_rows_BV, teacher_sums):
            q_RK = _logits(teacher, centre_K, sums_of[0], teacher_temperature).exp() * (share_B / sums_of[1])[:, None]
            grad_BK = grad_BK - (q_RK if meets is None else torch.where(meets[:, None], q_RK, 0))
        return None, grad_BK.to(student_BK.dtype), None, None, None, None, None


def _wide(logits_RK: Tensor, centre_K: Tensor | None) -> Tensor:
    x_RK = logits_RK.to(torch.promote_types(logits_RK.dtype, torch.float32))
    return x_RK if centre_K is None else x_RK - centre_K


def _logits(logits_RK: Tensor, centre_K: Tensor | None, top_R: Tensor, temperature: float | Tensor) -> Tensor:
    """(logits - centre - largest of the row) / temperature."""
    return (_wide(logits_RK, centre_K) - top_R[:, None]) / temperature


def _sums(logits_RK: Tensor, centre_K: Tensor | None, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of logits - centre the largest entry and the sum of exp((entry - largest) / temperature), each [R]."""
    top_R = _wide(logits_RK, centre_K).amax(1)
    return top_R, _logits(logits_RK, centre_K, top_R, temperature).exp().sum(1)


def _teachers(
    teacher_GK: Tensor, teacher_rows_BV: Tensor | None, sums: Sequence[Tensor]
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor | None]]:
    """For each place among the teacher rows that a student row meets: rows [B, K], their sums, and whether there is one."""
    if teacher_rows_BV is None:
        yield teacher_GK, tuple(sums), None
        return
    for teacher_B in teacher_rows_BV.unbind(1):
        some_B = teacher_B.clamp(min=0)
        yield teacher_GK[some_B], tuple(x[some_B] for x in sums), teacher_B >= 0


def _pairs(like_B: Tensor, teacher_rows_BV: Tensor | None) -> Tensor:
    """How many teacher rows each student row meets, in the dtype of `like_B`."""
    return torch.ones_like(like_B) if teacher_rows_BV is None else (teacher_rows_BV >= 0).sum(1).to(like_B.dtype)

"""Soft cross-entropy in plain torch, some rows at a time.

G teacher rows, B student rows, K prototypes, V teacher rows of a student row, R rows at a time.
"""

import torch
from torch import Tensor

from kernels.chunks import row_chunks


def forward(
    teacher_GK: Tensor,
    student_BK: Tensor,
    centre_K: Tensor | None,
    teacher_rows_BV: Tensor | None,
    weights_B: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.soft_cross_entropy`."""
    wide, student_wide = (torch.promote_types(x.dtype, torch.float32) for x in (teacher_GK, student_BK))
    teacher_sums_2G = teacher_GK.new_empty(2, len(teacher_GK), dtype=wide)
    student_sums_2B = student_BK.new_empty(2, len(student_BK), dtype=student_wide)
    losses_B = student_BK.new_empty(len(student_BK), dtype=torch.promote_types(wide, student_wide))
    pairs_B = _pairs(student_sums_2B, teacher_rows_BV)
    if teacher_rows_BV is not None:
        for rows in row_chunks(teacher_GK):
            teacher_sums_2G[:, rows] = _exponentials(teacher_GK[rows], centre_K, teacher_temperature)[1]
    for rows in row_chunks(student_BK):
        if teacher_rows_BV is None:
            target_RK, teacher_sums_2G[:, rows] = _exponentials(teacher_GK[rows], centre_K, teacher_temperature)
            target_RK /= teacher_sums_2G[1, rows, None]
        else:
            target_RK = _targets(teacher_GK, centre_K, teacher_rows_BV[rows], teacher_sums_2G, teacher_temperature)
        y_RK = student_BK[rows].to(student_wide)
        top_R = y_RK.amax(1)
        y_RK = (y_RK - top_R[:, None]).div_(student_temperature)
        total_R = y_RK.exp().sum(1)
        student_sums_2B[:, rows] = torch.stack((top_R, total_R))
        losses_B[rows] = pairs_B[rows] * total_R.log() - (target_RK * y_RK).sum(1)
    loss = losses_B.sum() / max(len(losses_B), 1) if weights_B is None else (weights_B * losses_B).sum()
    return loss, teacher_sums_2G, student_sums_2B


def backward(
    grad_loss: Tensor,
    teacher_GK: Tensor,
    student_BK: Tensor,
    centre_K: Tensor | None,
    teacher_rows_BV: Tensor | None,
    weights_B: Tensor | None,
    teacher_sums_2G: Tensor,
    student_sums_2B: Tensor,
    teacher_temperature: float,
    student_temperature: float,
) -> Tensor:
    """Gradient of the student's logits: its softmax, once per pair, minus the targets, formed again from their sums."""
    grad_BK = student_BK.new_empty(student_BK.shape)
    pairs_B = _pairs(student_sums_2B, teacher_rows_BV)
    weights_B = torch.full_like(pairs_B, 1 / max(len(pairs_B), 1)) if weights_B is None else weights_B.to(pairs_B)
    share_B = weights_B * (grad_loss / student_temperature)
    for rows in row_chunks(student_BK):
        if teacher_rows_BV is None:
            target_RK = _softmax(teacher_GK[rows], centre_K, teacher_sums_2G[:, rows], teacher_temperature)
        else:
            target_RK = _targets(teacher_GK, centre_K, teacher_rows_BV[rows], teacher_sums_2G, teacher_temperature)
        p_RK = _softmax(student_BK[rows], None, student_sums_2B[:, rows], student_temperature)
        grad_BK[rows] = p_RK.mul_(pairs_B[rows, None]).sub_(target_RK).mul_(share_B[rows, None])
    return grad_BK


def _centred(logits_RK: Tensor, centre_K: Tensor | None, wide: torch.dtype) -> Tensor:
    x_RK = logits_RK.to(wide)
    return x_RK if centre_K is None else x_RK - centre_K


def _exponentials(logits_RK: Tensor, centre_K: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """exp((entry - largest of its row) / temperature), with the largest and the sum of each row [2, R]."""
    x_RK = _centred(logits_RK, centre_K, torch.promote_types(logits_RK.dtype, torch.float32))
    top_R = x_RK.amax(1)
    x_RK = (x_RK - top_R[:, None]).div_(temperature).exp_()
    return x_RK, torch.stack((top_R, x_RK.sum(1)))


def _softmax(logits_RK: Tensor, centre_K: Tensor | None, sums_2R: Tensor, temperature: float) -> Tensor:
    """softmax((logits - centre) / temperature) from the sums that `_exponentials` found."""
    top_R, total_R = sums_2R
    x_RK = _centred(logits_RK, centre_K, sums_2R.dtype)
    return (x_RK - top_R[:, None]).div_(temperature).exp_().div_(total_R[:, None])


def _targets(
    teacher_GK: Tensor, centre_K: Tensor | None, teacher_rows_RV: Tensor, teacher_sums_2G: Tensor, temperature: float
) -> Tensor:
    """Sum of the teacher's distributions that each row names."""
    target_RK = 0
    for teacher_R in teacher_rows_RV.unbind(1):
        some_R = teacher_R.clamp(min=0)
        q_RK = _softmax(teacher_GK[some_R], centre_K, teacher_sums_2G[:, some_R], temperature)
        target_RK = target_RK + q_RK.masked_fill_((teacher_R < 0)[:, None], 0)
    return target_RK


def _pairs(student_sums_2B: Tensor, teacher_rows_BV: Tensor | None) -> Tensor:
    """How many teacher rows each student row meets, [B] in the wide dtype of the student."""
    if teacher_rows_BV is None:
        return torch.ones_like(student_sums_2B[0])
    return (teacher_rows_BV >= 0).sum(1).to(student_sums_2B.dtype)

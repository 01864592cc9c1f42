"""Sinkhorn in plain torch, some rows at a time. B rows, K prototypes, R rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor


def sweep(scores_BK: Tensor, log_u_K: Tensor | None, temperature: float) -> Tensor:
    """One iteration: rows normalised under log_u (none: left as they are), then the log-sum-exp of each column."""
    wide = torch.promote_types(scores_BK.dtype, torch.float32)
    if log_u_K is None:
        column_lse_K = scores_BK.new_full(scores_BK.shape[1:], -torch.inf, dtype=wide)
        for rows in _chunks(scores_BK):
            logits_RK = scores_BK[rows].to(wide) / temperature
            column_lse_K = torch.logaddexp(column_lse_K, logits_RK.logsumexp(0))
        return column_lse_K
    # columns summed to 1 before rows did, so some entry of each is at least 1 / (B K): a plain sum cannot underflow
    column_sum_K = torch.zeros_like(log_u_K)
    for rows in _chunks(scores_BK):
        column_sum_K += _logits(scores_BK[rows], log_u_K, temperature).softmax(1).sum(0)
    return column_sum_K.log() - log_u_K


def assign(scores_BK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    """Q [B,K]: rows of exp(scores / temperature + log_u), normalised."""
    q_BK = torch.empty_like(scores_BK, dtype=log_u_K.dtype, memory_format=torch.contiguous_format)
    for rows in _chunks(scores_BK):
        q_BK[rows] = _logits(scores_BK[rows], log_u_K, temperature).softmax(1)
    return q_BK


def cross_entropy_forward(
    scores_BK: Tensor, log_u_K: Tensor, student_BK: Tensor, temperature: float, student_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, and per row the largest logit and the sum of exponentials, of the targets and of the student."""
    batch, student_wide = len(scores_BK), torch.promote_types(student_BK.dtype, torch.float32)
    target_rows_2B = scores_BK.new_empty(2, batch, dtype=log_u_K.dtype)
    student_rows_2B = student_BK.new_empty(2, batch, dtype=student_wide)
    loss = scores_BK.new_zeros((), dtype=torch.promote_types(log_u_K.dtype, student_wide))
    for rows in _chunks(scores_BK):
        logits_RK = _logits(scores_BK[rows], log_u_K, temperature)
        student_RK = student_BK[rows].to(student_wide) / student_temperature
        top_R, student_top_R = logits_RK.amax(1), student_RK.amax(1)
        weight_RK = logits_RK.sub_(top_R[:, None]).exp_()
        student_RK.sub_(student_top_R[:, None])
        total_R, student_total_R = weight_RK.sum(1), student_RK.exp().sum(1)
        target_rows_2B[:, rows] = torch.stack((top_R, total_R))
        student_rows_2B[:, rows] = torch.stack((student_top_R, student_total_R))
        loss += (student_total_R.log() - weight_RK.mul(student_RK).sum(1) / total_R).sum()
    return loss / max(batch, 1), target_rows_2B, student_rows_2B


def cross_entropy_backward(
    grad_loss: Tensor,
    scores_BK: Tensor,
    log_u_K: Tensor,
    student_BK: Tensor,
    target_rows_2B: Tensor,
    student_rows_2B: Tensor,
    temperature: float,
    student_temperature: float,
) -> Tensor:
    """Gradient of the student's logits: softmax minus target, the target formed again from its vectors."""
    grad_BK = torch.empty_like(student_BK, memory_format=torch.contiguous_format)
    scale = grad_loss / (max(len(scores_BK), 1) * student_temperature)
    for rows in _chunks(scores_BK):
        top_R1, total_R1 = target_rows_2B[:, rows, None]
        student_top_R1, student_total_R1 = student_rows_2B[:, rows, None]
        q_RK = _logits(scores_BK[rows], log_u_K, temperature).sub_(top_R1).exp_().mul_(scale / total_R1)
        p_RK = (student_BK[rows].to(student_rows_2B.dtype) / student_temperature).sub_(student_top_R1).exp_()
        grad_BK[rows] = p_RK.mul_(scale / student_total_R1).sub_(q_RK)
    return grad_BK


def _logits(scores_RK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    return torch.add(log_u_K, scores_RK.to(log_u_K.dtype), alpha=1 / temperature)


def _chunks(x_BK: Tensor) -> Iterator[slice]:
    rows, step = len(x_BK), _step(x_BK)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _step(x_BK: Tensor) -> int:
    # a CPU keeps 1 MB of fp32 in its cache; a GPU wants few, large launches
    elements = 2**18 if x_BK.device.type == "cpu" else 2**26
    return max(1, elements // x_BK.shape[1])

"""Sinkhorn in plain torch, some rows at a time. B rows, K prototypes, R rows at a time."""

import torch
from torch import Tensor

from kernels.chunks import row_chunks


def sweep(scores_BK: Tensor, log_u_K: Tensor | None, temperature: float) -> Tensor:
    """One iteration: rows normalised under log_u (none: left as they are), then the log-sum-exp of each column."""
    wide = torch.promote_types(scores_BK.dtype, torch.float32)
    if log_u_K is None:
        column_lse_K = scores_BK.new_full(scores_BK.shape[1:], -torch.inf, dtype=wide)
        for rows in row_chunks(scores_BK):
            logits_RK = scores_BK[rows].to(wide) / temperature
            column_lse_K = torch.logaddexp(column_lse_K, logits_RK.logsumexp(0))
        return column_lse_K
    # columns summed to 1 before rows did, so some entry of each is at least 1 / (B K): a plain sum cannot underflow
    column_sum_K = torch.zeros_like(log_u_K)
    for rows in row_chunks(scores_BK):
        column_sum_K += _logits(scores_BK[rows], log_u_K, temperature).softmax(1).sum(0)
    return column_sum_K.log() - log_u_K


def assign(scores_BK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    """Q [B,K]: rows of exp(scores / temperature + log_u), normalised."""
    q_BK = torch.empty_like(scores_BK, dtype=log_u_K.dtype, memory_format=torch.contiguous_format)
    for rows in row_chunks(scores_BK):
        q_BK[rows] = _logits(scores_BK[rows], log_u_K, temperature).softmax(1)
    return q_BK


def _logits(scores_RK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    return torch.add(log_u_K, scores_RK.to(log_u_K.dtype), alpha=1 / temperature)

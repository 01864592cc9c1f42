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


def _logits(scores_RK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    return torch.add(log_u_K, scores_RK.to(log_u_K.dtype), alpha=1 / temperature)


def _chunks(x_BK: Tensor) -> Iterator[slice]:
    rows, step = len(x_BK), _step(x_BK)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _step(x_BK: Tensor) -> int:
    # a CPU keeps 1 MB of fp32 in its cache; a GPU wants few, large launches
    elements = 2**18 if x_BK.device.type == "cpu" else 2**26
    return max(1, elements // x_BK.shape[1])

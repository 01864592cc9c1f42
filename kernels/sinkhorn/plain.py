"""Sinkhorn in plain torch, for the compiler to fuse: no op of ours, the whole matrix at once. B rows, K prototypes."""

import torch
from torch import Tensor


def sweep(scores_BK: Tensor, log_u_K: Tensor | None, temperature: float | Tensor) -> Tensor:
    """One iteration: rows normalised under log_u (none: left as they are), then the log-sum-exp of each column."""
    if log_u_K is None:
        return _scaled(scores_BK, temperature).logsumexp(0)
    # columns summed to 1 before rows did, so some entry of each is at least 1 / (B K): a plain sum cannot underflow
    return sinkhorn_assign(scores_BK, log_u_K, temperature).sum(0).log() - log_u_K


def sinkhorn_balance(scores_BK: Tensor, temperature: float | Tensor, iterations: int) -> Tensor:
    """log_u [K], of mean 0, after so many sweeps."""
    log_u_K = None
    for _ in range(iterations):
        column_lse_K = sweep(scores_BK, log_u_K, temperature)
        log_u_K = column_lse_K.mean() - column_lse_K
    return log_u_K


def sinkhorn_assign(scores_BK: Tensor, log_u_K: Tensor, temperature: float | Tensor) -> Tensor:
    """Q [B,K]: rows of exp(scores / temperature + log_u), normalised."""
    # The compiler writes what as_strided is taken of before it goes on. In line, log_u has too many parts to be formed again at
    # every element, and the logits [B,K] would be written instead.
    log_u_K = log_u_K.as_strided(log_u_K.shape, (1,))
    logits_BK = _scaled(scores_BK, temperature) + log_u_K
    logits_BK = logits_BK - logits_BK.amax(1, keepdim=True)
    # not the exponentials that the total sums over again: those of two passes would be written by the first
    return (logits_BK - logits_BK.exp().sum(1, keepdim=True).log()).exp()


def _scaled(scores_BK: Tensor, temperature: float | Tensor) -> Tensor:
    return scores_BK.to(torch.promote_types(scores_BK.dtype, torch.float32)) / temperature

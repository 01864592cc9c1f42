"""InfoNCE in plain torch, some rows of the similarities at a time. B queries, M keys, C channels, R rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

# similarities alive at once: 16 MB in fp32
_ELEMENTS = 2**22


def forward(queries_BC: Tensor, keys_MC: Tensor, targets_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """See `kernels.info_nce`; returns (loss, lse [B])."""
    batch, wide = len(queries_BC), torch.promote_types(queries_BC.dtype, torch.float32)
    lse_B = queries_BC.new_empty(batch, dtype=wide)
    loss = queries_BC.new_zeros((), dtype=wide)
    keys_CM = keys_MC.to(wide).T
    for rows in _chunks(batch, len(keys_MC)):
        logits_RM = (queries_BC[rows].to(wide) / temperature) @ keys_CM
        lse_B[rows] = logits_RM.logsumexp(1)
        loss += (lse_B[rows] - logits_RM.gather(1, targets_B[rows, None]).squeeze(1)).sum()
    return loss / max(batch, 1), lse_B


def backward(
    grad_loss: Tensor, queries_BC: Tensor, keys_MC: Tensor, targets_B: Tensor, lse_B: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys; the similarities are formed again."""
    batch, wide = len(queries_BC), lse_B.dtype
    grad_queries_BC = queries_BC.new_empty(queries_BC.shape, dtype=wide)
    grad_keys_MC = keys_MC.new_zeros(keys_MC.shape, dtype=wide)
    wide_keys_MC = keys_MC.to(wide)
    for rows in _chunks(batch, len(keys_MC)):
        # the scale of the loss and the temperature go on the small matrices
        queries_RC = queries_BC[rows].to(wide) / temperature
        p_RM = (queries_RC @ wide_keys_MC.T).sub_(lse_B[rows, None]).exp_()
        p_RM.scatter_add_(1, targets_B[rows, None], p_RM.new_full((len(p_RM), 1), -1.0))
        grad_queries_BC[rows] = p_RM @ wide_keys_MC
        grad_keys_MC.addmm_(p_RM.T, queries_RC)
    scale = grad_loss / max(batch, 1)
    return (grad_queries_BC * (scale / temperature)).to(queries_BC.dtype), (grad_keys_MC * scale).to(keys_MC.dtype)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

"""InfoNCE in plain torch, for the compiler to fuse: no op of ours, all similarities at once.

The compiler cannot fuse a product with what follows it, so [B, M] matrices meet in memory. None outlives the call: in eager mode
backward forms the similarities again; compiled, the products of both gradients, which the incoming one only scales, are taken in
forward already, from similarities that are formed once.

B queries, M keys, C channels.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.registration import without_autocast


def info_nce(queries_BC: Tensor, keys_MC: Tensor, targets_B: Tensor, temperature: float | Tensor) -> Tensor:
    """See `kernels.info_nce`; differentiable in queries_BC and keys_MC."""
    return _InfoNCE.apply(queries_BC, keys_MC, targets_B, temperature)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, queries_BC, keys_MC, targets_B, temperature):
        logits_BM = _logits(queries_BC, keys_MC, temperature)
        lse_B = logits_BM.logsumexp(1)
        ctx.save_for_backward(queries_BC, keys_MC, targets_B, lse_B)
        ctx.temperature = temperature
        return (lse_B - logits_BM.gather(1, targets_B[:, None])[:, 0]).sum() / max(len(queries_BC), 1)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad_loss):
        queries_BC, keys_MC, targets_B, lse_B = ctx.saved_tensors
        wide, temperature = lse_B.dtype, ctx.temperature
        p_BM = (_logits(queries_BC, keys_MC, temperature) - lse_B[:, None]).exp()
        places_M = torch.arange(len(keys_MC), device=keys_MC.device)
        p_BM = p_BM - (places_M == targets_B[:, None]).to(wide)
        # the scale of the loss and the temperature go on the small matrices
        scale = grad_loss / max(len(queries_BC), 1) / temperature
        grad_queries_BC, grad_keys_MC = p_BM @ keys_MC.to(wide), p_BM.T @ queries_BC.to(wide)
        return (grad_queries_BC * scale).to(queries_BC.dtype), (grad_keys_MC * scale).to(keys_MC.dtype), None, None


def _logits(queries_BC: Tensor, keys_MC: Tensor, temperature: float | Tensor) -> Tensor:
    wide = torch.promote_types(queries_BC.dtype, torch.float32)
    return (queries_BC.to(wide) / temperature) @ keys_MC.to(wide).T

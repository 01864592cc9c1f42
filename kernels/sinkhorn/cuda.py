"""Sinkhorn-Knopp in CUDA C++ (csrc/sinkhorn.cu): fp16, bf16 and fp32, up to 131,072 prototypes; built for sm_80 and
sm_90a.

All iterations are one launch. Each reads the scores once: from memory, or, where all of them fit in the shared memory
of the GPU, from there. No sum depends on the order in which blocks come, so the same input gives the same bits.
Rows that do not start on 16 bytes, as with an odd number of prototypes, are copied first.
"""

import torch
from torch import Tensor

from kernels import library

NEEDS_GPU = True
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_PROTOTYPES = 131072  # as in csrc/sinkhorn.h

library.load()
_ops = torch.ops.tessera_cuda


def balance(scores_BK: Tensor, temperature: float, iterations: int) -> Tensor:
    """In one launch; see `kernels.sinkhorn`."""
    _check(scores_BK)
    return -_ops.sinkhorn_balance(_in_chunks(scores_BK), None, temperature, iterations)


def sweep(scores_BK: Tensor, log_u_K: Tensor | None, temperature: float) -> Tensor:
    """See `kernels.sinkhorn`."""
    _check(scores_BK)
    return -_ops.sinkhorn_balance(_in_chunks(scores_BK), _contiguous(log_u_K), temperature, 1)


def assign(scores_BK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    """See `kernels.sinkhorn`."""
    _check(scores_BK)
    return _ops.sinkhorn_assign(_in_chunks(scores_BK), log_u_K.contiguous(), temperature)


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES or x.shape[1] > MAX_PROTOTYPES:
        raise ValueError(
            f"sinkhorn in CUDA C++ takes float16, bfloat16 and float32 and up to {MAX_PROTOTYPES} prototypes, got "
            f"{x.dtype} and {x.shape[1]}; the reference takes the others"
        )


def _in_chunks(x_BK: Tensor) -> Tensor:
    """x as it is where each row starts on 16 bytes, which is how the kernels read; else a copy with longer rows."""
    chunk = 16 // x_BK.element_size()
    if x_BK.stride(1) == 1 and x_BK.stride(0) % chunk == 0 and x_BK.data_ptr() % 16 == 0:
        return x_BK
    rows, prototypes = x_BK.shape
    longer = x_BK.new_empty(rows, -(-prototypes // chunk) * chunk)
    return longer[:, :prototypes].copy_(x_BK)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()

"""Sinkhorn-Knopp in CUDA C++ (csrc/sinkhorn.cu): fp16, bf16 and fp32, up to 131,072 prototypes; built for sm_80 and
sm_90a.

All iterations are one launch. Each reads the scores once: from memory, or, where all of them fit in the shared memory
of the GPU, from there. No sum depends on the order in which blocks come, so the same input gives the same bits.
Rows that do not start on 16 bytes, as with an odd number of prototypes, are copied first.
"""

import torch
from torch import Tensor

from kernels import library

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_PROTOTYPES = 131072  # as in csrc/sinkhorn.h

library.load()
_ops = torch.ops.tessera_cuda


def balance(scores_BK: Tensor, temperature: float, iterations: int) -> Tensor:
    """log_u after some iterations, in one launch; see `kernels.sinkhorn`."""
    _check("sinkhorn", scores_BK)
    return _ops.sinkhorn_balance(_in_chunks(scores_BK), None, temperature, iterations)


def sweep(scores_BK: Tensor, log_u_K: Tensor | None, temperature: float) -> Tensor:
    """See `kernels.sinkhorn`."""
    _check("sinkhorn", scores_BK)
    return -_ops.sinkhorn_balance(_in_chunks(scores_BK), _contiguous(log_u_K), temperature, 1)


def assign(scores_BK: Tensor, log_u_K: Tensor, temperature: float) -> Tensor:
    """See `kernels.sinkhorn`."""
    _check("sinkhorn", scores_BK)
    return _ops.sinkhorn_assign(_in_chunks(scores_BK), log_u_K.contiguous(), temperature)


def cross_entropy_forward(
    scores_BK: Tensor, log_u_K: Tensor, student_BK: Tensor, temperature: float, student_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.sinkhorn`."""
    _check("sinkhorn_cross_entropy", scores_BK, student_BK)
    scores_BK, student_BK = _alike(scores_BK, student_BK)
    return _ops.sinkhorn_cross_entropy_forward(
        scores_BK, log_u_K.contiguous(), student_BK, temperature, student_temperature
    )


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
    """See `kernels.sinkhorn`."""
    _check("sinkhorn_cross_entropy", scores_BK, student_BK)
    scores_BK, wide_student_BK = _alike(scores_BK, student_BK)
    grad_BK = _ops.sinkhorn_cross_entropy_backward(
        grad_loss.float(),
        scores_BK,
        log_u_K.contiguous(),
        wide_student_BK,
        target_rows_2B.contiguous(),
        student_rows_2B.contiguous(),
        temperature,
        student_temperature,
    )
    return grad_BK.to(student_BK.dtype)


def _check(op: str, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype not in DTYPES or x.shape[1] > MAX_PROTOTYPES:
            raise ValueError(
                f"{op} in CUDA C++ takes float16, bfloat16 and float32 and up to {MAX_PROTOTYPES} prototypes, got "
                f"{x.dtype} and {x.shape[1]}; the reference takes the others"
            )


def _alike(scores: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, which holds either exactly, and in chunks."""
    dtype = torch.promote_types(scores.dtype, student.dtype)
    return _in_chunks(scores.to(dtype)), _in_chunks(student.to(dtype))


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

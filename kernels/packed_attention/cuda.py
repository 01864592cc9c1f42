"""Packed attention in CUDA C++ (csrc/packed_attention.cu): fp16 and bf16, sequences of up to 320 tokens;
built for sm_80 and sm_90a.

One block per (sequence, head), rows padded to a multiple of 16: 197 tokens cost 208, 50 cost 64. Backward is one kernel
that writes each gradient once, without atomics, so the same input gives the same bits.
"""

import torch
from torch import Tensor

from kernels import library
from kernels.packed_attention.layout import in_chunks

NEEDS_GPU = True
DTYPES = (torch.float16, torch.bfloat16)
MAX_LENGTH = 320  # as in csrc/packed_attention.h

library.load()
_ops = torch.ops.tessera_cuda


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.packed_attention`; returns (out [T,H,D], lse fp32 [H,T])."""
    _check(qkv_T3HD, max_seqlen)
    return _ops.packed_attention_forward(
        in_chunks(qkv_T3HD), cu_seqlens.contiguous(), max_seqlen, _contiguous(kv_lengths), scale
    )


def backward(
    grad_out_THD: Tensor,
    qkv_T3HD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    kv_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Gradient of qkv, [T,3,H,D] contiguous."""
    _check(qkv_T3HD, max_seqlen)
    return _ops.packed_attention_backward(
        in_chunks(grad_out_THD),
        in_chunks(qkv_T3HD),
        out_THD.contiguous(),
        lse_HT.contiguous(),
        cu_seqlens.contiguous(),
        max_seqlen,
        _contiguous(kv_lengths),
        scale,
    )


def _check(qkv: Tensor, max_seqlen: int) -> None:
    if qkv.dtype not in DTYPES or max_seqlen > MAX_LENGTH:
        raise ValueError(
            f"packed_attention in CUDA C++ takes float16 or bfloat16 and sequences of up to {MAX_LENGTH} tokens, got "
            f"{qkv.dtype} and {max_seqlen}; triton and reference take the others"
        )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()

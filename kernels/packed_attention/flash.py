"""Packed attention on a CPU by aten's flash attention, whatever the length; the reference has it from 65 tokens on."""

from torch import Tensor

from kernels.packed_attention.reference import (
    cpu_flash_backward,
    cpu_flash_forward,
    grouped_backward,
    grouped_forward,
    last_dim_contiguous,
)


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.packed_attention`; returns (out [T,H,D], lse [H,T])."""
    _check(qkv_T3HD)
    return grouped_forward(cpu_flash_forward, last_dim_contiguous(qkv_T3HD), cu_seqlens, max_seqlen, kv_lengths, scale)


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
    _check(qkv_T3HD)
    qkv_T3HD, grad_out_THD = last_dim_contiguous(qkv_T3HD), last_dim_contiguous(grad_out_THD)
    layout_and_scale = (cu_seqlens, max_seqlen, kv_lengths, scale)
    return grouped_backward(cpu_flash_backward, grad_out_THD, qkv_T3HD, out_THD, lse_HT, *layout_and_scale)


def _check(qkv: Tensor) -> None:
    if qkv.device.type != "cpu":
        raise ValueError("flash is aten's attention for CPUs; on a GPU the reference is it")

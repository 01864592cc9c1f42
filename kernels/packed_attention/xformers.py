"""Packed attention by xformers where it is installed, which nothing here requires: fp16 and bf16 from sm_80 on.

xformers wraps several kernels. Taken are those that aten lacks: FlashAttention 3 and 2 of the packages of these names. Its
CUTLASS operator is aten's, which `efficient` is, and without those packages so is its flash attention, which the reference is:
then there is nothing to take. Mixed lengths cost no host sync: xformers is handed cu_seqlens as they lie on the device.
It has not run on a GPU yet: calibration proves it there before it is taken.

B batch and M rows of it: S and max_seqlen where all sequences are equally long, else 1 and T.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias, flash, flash3

from kernels.packed_attention.layout import equally_long, in_chunks
from kernels.packed_attention.places import KeysFirst, taken

NEEDS_GPU = True
DTYPES = (torch.float16, torch.bfloat16)

# the names of operators that run aten's kernels end like this
OPERATORS = [
    (module.FwOp, module.BwOp)
    for module in (flash3, flash)
    if module.FwOp.is_available() and module.BwOp.is_available() and not module.FwOp.NAME.endswith("-pt")
]
if not OPERATORS:
    raise ValueError("xformers finds neither flash_attn_3 nor flash_attn here, and has only aten's own kernels then")


class _Batch(NamedTuple):
    """The packed batch as xformers takes it."""

    shape: tuple[int, int]
    """B and M."""
    mask: Any
    keys: KeysFirst | None

    @staticmethod
    def of(tokens: int, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None) -> "_Batch":
        if equally_long(tokens, cu_seqlens, max_seqlen, kv_lengths):
            return _Batch((len(cu_seqlens) - 1, max_seqlen), None, None)
        keys = None if kv_lengths is None else KeysFirst.of(tokens, cu_seqlens, kv_lengths)
        asked = _lengths(cu_seqlens, max_seqlen)
        mask = attn_bias.BlockDiagonalMask(asked, asked if keys is None else _lengths(keys.cu_keys, max_seqlen))
        return _Batch((1, tokens), mask, keys)


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.packed_attention`; returns (out [T,H,D], lse fp32 [H,T]). ValueError for fp32, fp64 and GPUs before sm_80."""
    _check(qkv_T3HD)
    tokens, _, heads, dim = qkv_T3HD.shape
    if not qkv_T3HD.numel():
        return qkv_T3HD.new_empty(tokens, heads, dim), qkv_T3HD.new_empty(heads, tokens, dtype=torch.float32)
    batch = _Batch.of(tokens, cu_seqlens, max_seqlen, kv_lengths)
    q, k, v = taken(in_chunks(qkv_T3HD), batch.shape, batch.keys)
    out, lse_BHM = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, batch.mask, scale=scale, op=_operators(qkv_T3HD)[0]
    )
    out_THD, lse_HT = out.flatten(0, 1).contiguous(), lse_BHM.transpose(0, 1).flatten(1).contiguous()
    if batch.keys is None:
        return out_THD, lse_HT
    return batch.keys.zeroed(out_THD), batch.keys.agreed(lse_HT)


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
    if not qkv_T3HD.numel():
        return qkv_T3HD.new_empty(qkv_T3HD.shape)
    batch = _Batch.of(len(qkv_T3HD), cu_seqlens, max_seqlen, kv_lengths)
    q, k, v = taken(in_chunks(qkv_T3HD), batch.shape, batch.keys)
    grad_out, out = (x.contiguous().unflatten(0, batch.shape) for x in (grad_out_THD, out_THD))
    lse_BHM = lse_HT.unflatten(1, batch.shape).transpose(0, 1).contiguous()
    grads = fmha.memory_efficient_attention_backward(
        grad_out, out, lse_BHM, q, k, v, batch.mask, scale=scale, op=_operators(qkv_T3HD)[1]
    )
    dq, dk, dv = (grad.flatten(0, 1) for grad in grads)
    if batch.keys is not None:
        dq, dk, dv = batch.keys.zeroed(dq), batch.keys.back(dk), batch.keys.back(dv)
    return torch.stack((dq, dk, dv), 1)


def _lengths(starts: Tensor, longest: int) -> Any:
    """Lengths as xformers keeps them. What only the host would have to know stays out: who reads it fails, and doesn't err."""
    return attn_bias._SeqLenInfo(seqstart=starts, max_seqlen=longest, min_seqlen=0, seqstart_py=[])


def _operators(qkv: Tensor) -> tuple[Any, Any]:
    """The first pair that takes the head dim on this GPU."""
    dim, capability = qkv.shape[-1], torch.cuda.get_device_capability(qkv.device)
    for forward_op, backward_op in OPERATORS:
        highest = forward_op.CUDA_MAXIMUM_COMPUTE_CAPABILITY or capability
        if (
            forward_op.CUDA_MINIMUM_COMPUTE_CAPABILITY <= capability <= highest
            and getattr(backward_op, "SUPPORTED_MIN_K", 0) <= dim <= backward_op.SUPPORTED_MAX_K
        ):
            return forward_op, backward_op
    names = ", ".join(forward_op.NAME for forward_op, _ in OPERATORS)
    raise ValueError(f"xformers has {names} here, none for head dim {dim} on sm_{capability[0]}{capability[1]}")


def _check(qkv: Tensor) -> None:
    if qkv.device.type != "cuda" or qkv.dtype not in DTYPES:
        raise ValueError(
            f"xformers takes float16 or bfloat16 on a GPU, got {qkv.dtype} on {qkv.device.type}; use efficient"
        )

"""Packed attention by cuDNN, through aten: fp16 and bf16 from sm_80 on, sequences of equal length, all tokens keys.

The only case whose layout the host knows from shapes alone. aten's cuDNN attention over cu_seqlens is no way to mixed lengths in
torch 2.11: its backward takes the head dim for the longest sequence (pytorch pull request 186142), and each call plans anew.
It has not run on a GPU yet: calibration proves it there before it is taken.

S sequences, L their length.
"""

import torch
from torch import Tensor

from kernels.packed_attention.layout import equally_long, in_chunks

NEEDS_GPU = True
DTYPES = (torch.float16, torch.bfloat16)

_aten = torch.ops.aten

if not torch.backends.cudnn.is_available():
    raise ValueError("torch was built without cuDNN")


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.packed_attention`; returns (out [T,H,D], lse fp32 [H,T]). ValueError for mixed lengths and for kv_lengths."""
    tokens, _, heads, dim = qkv_T3HD.shape
    _check(qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths)
    if not qkv_T3HD.numel():
        return qkv_T3HD.new_empty(tokens, heads, dim), qkv_T3HD.new_empty(heads, tokens, dtype=torch.float32)
    q, k, v = _batched(in_chunks(qkv_T3HD), max_seqlen)
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    # as [S,H,L,1]
    lse_HT = lse.squeeze(-1).transpose(0, 1).flatten(1)
    return out.transpose(1, 2).flatten(0, 1).contiguous(), lse_HT.contiguous()


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
    _check(qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths)
    if not qkv_T3HD.numel():
        return qkv_T3HD.new_empty(qkv_T3HD.shape)
    q, k, v = _batched(in_chunks(qkv_T3HD), max_seqlen)
    grad_out, out = (x.contiguous().unflatten(0, (-1, max_seqlen)).transpose(1, 2) for x in (grad_out_THD, out_THD))
    lse_SHL1 = lse_HT.unflatten(1, (-1, max_seqlen)).transpose(0, 1).contiguous().unsqueeze(-1)
    # without dropout the two random states are never read
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse_SHL1, unused, unused, None, None, None, max_seqlen, max_seqlen, 0.0, False,
        scale=scale,
    )  # fmt: skip
    return torch.stack([grad.transpose(1, 2) for grad in grads], 2).flatten(0, 1)


def _batched(qkv_T3HD: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each [S,H,L,D]."""
    return qkv_T3HD.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4).unbind(0)


def _check(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None) -> None:
    if qkv.device.type != "cuda" or qkv.dtype not in DTYPES:
        raise ValueError(
            f"cudnn takes float16 or bfloat16 on a GPU, got {qkv.dtype} on {qkv.device.type}; use efficient"
        )
    if torch.cuda.get_device_capability(qkv.device) < (8, 0):
        raise ValueError("cudnn needs a GPU of sm_80 or later; efficient and reference take earlier ones")
    check_layout(len(qkv), cu_seqlens, max_seqlen, kv_lengths)


def check_layout(tokens: int, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None) -> None:
    """ValueError for a layout that cuDNN cannot take."""
    if kv_lengths is not None:
        raise ValueError("cudnn takes no kv_lengths: the host does not know them; use efficient or reference")
    if tokens and not equally_long(tokens, cu_seqlens, max_seqlen, kv_lengths):
        raise ValueError(
            f"cudnn takes sequences of equal length, got {tokens} tokens in {len(cu_seqlens) - 1} of up to {max_seqlen}"
        )
    if max_seqlen == 1:
        raise ValueError("cudnn takes sequences of two tokens or more, got one")

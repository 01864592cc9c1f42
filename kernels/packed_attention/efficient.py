"""Packed attention by aten's memory-efficient attention (CUTLASS): fp16, bf16 and fp32, every GPU that torch supports.

Sequences of equal length form a batch; others are told apart by cu_seqlens, without a host sync. Its log-sum-exp has one row
of up to max_seqlen per (sequence, head), padded to a multiple of 32 with +inf; it is brought to [H,T] and back. Where every
token is a key the three gradients are written into one tensor. Backward may split keys among programs that add up in any
order. It has not run on a GPU yet: calibration proves it there before it is taken.

B batch and M rows of it: S and max_seqlen where all sequences are equally long, else 1 and T.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed_attention import places
from kernels.packed_attention.layout import equally_long, in_chunks

NEEDS_GPU = True
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ALIGNED = 32  # rows to which the kernel pads the log-sum-exp
_NO_MASK = 0

_aten = torch.ops.aten


class _Batch(NamedTuple):
    """The packed batch as the kernel takes it."""

    shape: tuple[int, int]
    """B and M."""
    cu_seqlens: Tensor | None
    cu_keys: Tensor | None
    longest: int
    keys: places.KeysFirst | None

    @staticmethod
    def of(tokens: int, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None) -> "_Batch":
        if equally_long(tokens, cu_seqlens, max_seqlen, kv_lengths):
            return _Batch((len(cu_seqlens) - 1, max_seqlen), None, None, max_seqlen, None)
        keys = None if kv_lengths is None else places.KeysFirst.of(tokens, cu_seqlens, kv_lengths)
        cu_keys = cu_seqlens if keys is None else keys.cu_keys
        # the kernel refuses a bound above the number of tokens
        return _Batch((1, tokens), cu_seqlens, cu_keys, min(max_seqlen, tokens), keys)

    def packed_lse(self, lse_SHM: Tensor, tokens: int) -> Tensor:
        """[S,H,padded longest] -> [H,T]."""
        lse_HSM = lse_SHM.transpose(0, 1)
        if self.cu_seqlens is None:
            return lse_HSM[:, :, : self.longest].flatten(1).contiguous()
        return lse_HSM[:, *places.of_tokens(tokens, self.cu_seqlens)].contiguous()

    def padded_lse(self, lse_HT: Tensor) -> Tensor:
        """[H,T] -> [S,H,padded longest]; +inf, which weighs nothing, where there is no row."""
        heads, tokens = lse_HT.shape
        if self.cu_seqlens is None:
            padding = (0, -self.longest % _ALIGNED)
            return F.pad(lse_HT.unflatten(1, self.shape), padding, value=torch.inf).transpose(0, 1).contiguous()
        rows = self.longest + -self.longest % _ALIGNED
        lse_SHM = lse_HT.new_full((len(self.cu_seqlens) - 1, heads, rows), torch.inf)
        lse_SHM.transpose(0, 1)[:, *places.of_tokens(tokens, self.cu_seqlens)] = lse_HT
        return lse_SHM


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.packed_attention`; returns (out [T,H,D], lse fp32 [H,T]). ValueError for fp64, and for bf16 before sm_80."""
    _check(qkv_T3HD)
    tokens, _, heads, dim = qkv_T3HD.shape
    if not qkv_T3HD.numel():
        return qkv_T3HD.new_empty(tokens, heads, dim), qkv_T3HD.new_empty(heads, tokens, dtype=torch.float32)
    batch = _Batch.of(tokens, cu_seqlens, max_seqlen, kv_lengths)
    q, k, v = places.taken(in_chunks(qkv_T3HD), batch.shape, batch.keys)
    longest = None if batch.cu_seqlens is None else batch.longest
    layout = (batch.cu_seqlens, batch.cu_keys, longest, longest)
    out, lse, *_ = _aten._efficient_attention_forward(q, k, v, None, *layout, 0.0, _NO_MASK, True, scale=scale)
    out_THD, lse_HT = out.flatten(0, 1), batch.packed_lse(lse, tokens)
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
    tokens, _, heads, dim = qkv_T3HD.shape
    if not qkv_T3HD.numel():
        return qkv_T3HD.new_empty(qkv_T3HD.shape)
    batch = _Batch.of(tokens, cu_seqlens, max_seqlen, kv_lengths)
    q, k, v = places.taken(in_chunks(qkv_T3HD), batch.shape, batch.keys)
    grad_out, out = (x.contiguous().unflatten(0, batch.shape) for x in (grad_out_THD, out_THD))
    layout = (batch.cu_seqlens, batch.cu_keys, batch.longest, batch.longest)
    # without dropout the two random states are never read
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = _aten._efficient_attention_backward(
        grad_out, q, k, v, None, out, *layout, batch.padded_lse(lse_HT), 0.0, unused, unused, _NO_MASK, False,
        scale=scale, shared_storage_dqdkdv=batch.keys is None,
    )  # fmt: skip
    if batch.keys is None:
        # three views of one tensor [B,M,3,H,D]
        row = heads * dim
        return dq.as_strided((tokens, 3, heads, dim), (3 * row, row, dim, 1), 0)
    return torch.stack((batch.keys.zeroed(dq[0]), batch.keys.back(dk[0]), batch.keys.back(dv[0])), 1)


def _check(qkv: Tensor) -> None:
    if qkv.device.type != "cuda" or qkv.dtype not in DTYPES:
        raise ValueError(
            f"efficient takes float16, bfloat16 or float32 on a GPU, got {qkv.dtype} on {qkv.device.type}; use reference"
        )
    if qkv.dtype == torch.bfloat16 and torch.cuda.get_device_capability(qkv.device) < (8, 0):
        raise ValueError("efficient takes bfloat16 from sm_80 on; use float16 or the reference on this GPU")

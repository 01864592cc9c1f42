"""Packed attention in plain torch: sequences of equal shape share one batched attention, so nothing is padded.

CPU: aten's flash attention, forward and backward, per group of sequences with equal length and number of keys; up to 64
tokens the formula written out, which takes half to nine tenths of its time there.
CUDA, 16 bit, from sm_80: aten's variable-length flash attention over the whole batch, without a host sync.
Elsewhere: the formula written out, on the same groups; scores are formed again in backward, never kept. Grouping reads
the layout on the host, which syncs a GPU, unless the shapes tell that all sequences are equally long and all tokens are
keys.

T tokens, S sequences of one group, L their length, K their keys, H heads, D head dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.packed_attention import layout
from kernels.packed_attention.places import KeysFirst

_aten = torch.ops.aten
_SHORT = 64  # tokens up to which a CPU is faster with the formula written out


class _Group(NamedTuple):
    """Sequences of equal length and number of keys; `rows` is a slice where they are neighbours, else row indices."""

    rows: slice | Tensor
    sequences: int
    length: int
    keys: int

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [S, L, ...], a view where the sequences are neighbours."""
        return packed[self.rows].unflatten(0, (self.sequences, self.length))


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.packed_attention`; returns (out [T,H,D], lse [H,T])."""
    qkv_T3HD = last_dim_contiguous(qkv_T3HD)
    if len(qkv_T3HD) and _has_gpu_flash(qkv_T3HD):
        return _gpu_flash_forward(qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths, scale)
    on_cpu = qkv_T3HD.device.type == "cpu"

    def attend(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        return (cpu_flash_forward if on_cpu and q.shape[2] > _SHORT else written_forward)(q, *others)

    return grouped_forward(attend, qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths, scale)


def grouped_forward(
    attend: Callable[..., tuple[Tensor, Tensor]],
    qkv_T3HD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    kv_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`forward` by a batched attention for each group of sequences of equal shape: attend(q, k, v, scale) -> (out, lse)."""
    tokens, _, heads, dim = qkv_T3HD.shape
    out_THD = qkv_T3HD.new_empty(tokens, heads, dim)
    lse_HT = qkv_T3HD.new_empty(heads, tokens, dtype=_wide(qkv_T3HD.dtype))
    for group in _groups(tokens, cu_seqlens, max_seqlen, kv_lengths):
        if group.keys == 0:
            out_THD[group.rows] = 0
            lse_HT[:, group.rows] = -torch.inf
            continue
        q, k, v = group.unpack(qkv_T3HD).permute(2, 0, 3, 1, 4)
        out_SHLD, lse_SHL = attend(q, k[:, :, : group.keys], v[:, :, : group.keys], scale)
        out_rows, lse_rows = out_SHLD.transpose(1, 2).flatten(0, 1), lse_SHL.transpose(0, 1).flatten(1)
        if len(out_rows) == tokens and isinstance(group.rows, slice):
            return out_rows.contiguous(), lse_rows.contiguous()
        out_THD[group.rows] = out_rows
        lse_HT[:, group.rows] = lse_rows
    return out_THD, lse_HT


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
    layout_and_scale = (cu_seqlens, max_seqlen, kv_lengths, scale)
    qkv_T3HD, grad_out_THD = last_dim_contiguous(qkv_T3HD), last_dim_contiguous(grad_out_THD)
    if len(qkv_T3HD) and _has_gpu_flash(qkv_T3HD):
        return _gpu_flash_backward(grad_out_THD, qkv_T3HD, out_THD, lse_HT, *layout_and_scale)
    on_cpu = qkv_T3HD.device.type == "cpu"

    def attend(grad_out: Tensor, q: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
        return (cpu_flash_backward if on_cpu and q.shape[2] > _SHORT else written_backward)(grad_out, q, *others)

    return grouped_backward(attend, grad_out_THD, qkv_T3HD, out_THD, lse_HT, *layout_and_scale)


def grouped_backward(
    attend: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad_out_THD: Tensor,
    qkv_T3HD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    kv_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """`backward`, as `grouped_forward`: attend(grad_out, q, k, v, out, lse, scale) -> (grad_q, grad_k, grad_v)."""
    tokens = len(qkv_T3HD)
    grad_T3HD = qkv_T3HD.new_empty(qkv_T3HD.shape)
    for group in _groups(tokens, cu_seqlens, max_seqlen, kv_lengths):
        if group.keys == 0:
            grad_T3HD[group.rows] = 0
            continue
        in_place = isinstance(group.rows, slice)
        grad_SL3HD = group.unpack(grad_T3HD) if in_place else grad_T3HD.new_empty(group.unpack(qkv_T3HD).shape)
        q, k, v = group.unpack(qkv_T3HD).permute(2, 0, 3, 1, 4)
        grad_out, out = (group.unpack(x).transpose(1, 2) for x in (grad_out_THD, out_THD))
        lse = lse_HT[:, group.rows].unflatten(1, (group.sequences, group.length)).transpose(0, 1)
        grads = attend(grad_out, q, k[:, :, : group.keys], v[:, :, : group.keys], out, lse, scale)
        if in_place and group.keys == group.length and group.sequences * group.length == tokens:
            return torch.stack([grad.transpose(1, 2) for grad in grads], 2).flatten(0, 1).to(qkv_T3HD.dtype)
        for target, grad in zip(grad_SL3HD.permute(2, 0, 3, 1, 4), grads, strict=True):
            rows = grad.shape[2]
            target[:, :, :rows] = grad
            target[:, :, rows:] = 0
        if not in_place:
            grad_T3HD[group.rows] = grad_SL3HD.flatten(0, 1)
    return grad_T3HD


def on_cpus(
    attend: Callable[..., tuple[Tensor, Tensor]],
    attend_back: Callable[..., tuple[Tensor, Tensor, Tensor]],
    refusal: str,
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """An implementation's forward and backward by one attention for sequences of any length, as `grouped_forward` and
    `grouped_backward` take it; for tensors elsewhere than on a CPU they raise ValueError with `refusal`."""

    def forward(qkv_T3HD: Tensor, *layout_and_scale: object) -> tuple[Tensor, Tensor]:
        check(qkv_T3HD)
        return grouped_forward(attend, last_dim_contiguous(qkv_T3HD), *layout_and_scale)

    def backward(grad_out_THD: Tensor, qkv_T3HD: Tensor, *others: object) -> Tensor:
        check(qkv_T3HD)
        return grouped_backward(attend_back, last_dim_contiguous(grad_out_THD), last_dim_contiguous(qkv_T3HD), *others)

    def check(qkv: Tensor) -> None:
        if qkv.device.type != "cpu":
            raise ValueError(refusal)

    return forward, backward


def _groups(tokens: int, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None) -> list[_Group]:
    sequences = len(cu_seqlens) - 1
    if layout.equally_long(tokens, cu_seqlens, max_seqlen, kv_lengths):
        on_cpu = cu_seqlens.device.type == "cpu"
        if not on_cpu or torch.equal(cu_seqlens, torch.arange(0, tokens + 1, max_seqlen, dtype=torch.int32)):
            return [_Group(slice(0, tokens), sequences, max_seqlen, max_seqlen)]
    members: dict[tuple[int, int], list[int]] = {}
    for start, length, keys in layout.read(tokens, cu_seqlens, max_seqlen, kv_lengths):
        if length:
            members.setdefault((length, keys), []).append(start)
    groups = []
    for (length, keys), first in members.items():
        rows: slice | Tensor = slice(first[0], first[0] + length * len(first))
        if first[-1] + length != rows.stop:
            index = torch.tensor(first).unsqueeze(1) + torch.arange(length)
            rows = index.flatten().to(cu_seqlens.device)
        groups.append(_Group(rows, len(first), length, keys))
    return groups


def cpu_flash_forward(q, k, v, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def cpu_flash_backward(grad_out, q, k, v, out, lse, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False, scale=scale
    )


def written_forward(q_SHLD, k_SHKD, v_SHKD, scale):
    q, k, v = (x.to(_wide(x.dtype)) for x in (q_SHLD, k_SHKD, v_SHKD))
    scores_SHLK = (q * scale) @ k.mT
    p_SHLK = scores_SHLK.softmax(-1)
    # the largest probability is exp(its score - lse), so the sum need not be formed a second time
    lse_SHL = scores_SHLK.amax(-1) - p_SHLK.amax(-1).log_()
    return (p_SHLK @ v).to(q_SHLD.dtype), lse_SHL


def written_backward(grad_out, q_SHLD, k_SHKD, v_SHKD, out, lse_SHL, scale):
    do, q, k, v = (x.to(_wide(x.dtype)) for x in (grad_out, q_SHLD, k_SHKD, v_SHKD))
    q = q * scale
    p_SHLK = (q @ k.mT).softmax(-1)
    ds_SHLK = _aten._softmax_backward_data(do @ v.mT, p_SHLK, -1, p_SHLK.dtype)
    return ds_SHLK @ k * scale, ds_SHLK.mT @ q, p_SHLK.mT @ do


def _gpu_flash_forward(qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths, scale):
    q, k, v = qkv_T3HD.unbind(1)
    keys, cu_keys = None, cu_seqlens
    if kv_lengths is not None:
        keys = KeysFirst.of(len(q), cu_seqlens, kv_lengths)
        k, v, cu_keys = keys.lay(k), keys.lay(v), keys.cu_keys
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_keys, max_seqlen, max_seqlen, 0.0, False, False, scale=scale
    )
    return out, lse if keys is None else keys.agreed(lse)


def _gpu_flash_backward(grad_out_THD, qkv_T3HD, out_THD, lse_HT, cu_seqlens, max_seqlen, kv_lengths, scale):
    q, k, v = qkv_T3HD.unbind(1)
    keys, cu_keys = None, cu_seqlens
    if kv_lengths is not None:
        keys = KeysFirst.of(len(q), cu_seqlens, kv_lengths)
        k, v, cu_keys = keys.lay(k), keys.lay(v), keys.cu_keys
    # without dropout the two random states are never read
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    layout = (cu_seqlens, cu_keys, max_seqlen, max_seqlen)
    dq, dk, dv = _aten._flash_attention_backward(
        grad_out_THD, q, k, v, out_THD, lse_HT, *layout, 0.0, False, rng_state, unused, scale=scale
    )
    if keys is not None:
        dk, dv = keys.back(dk), keys.back(dv)
    return torch.stack((dq, dk, dv), 1)


def _has_gpu_flash(x: Tensor) -> bool:
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 0)


def last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

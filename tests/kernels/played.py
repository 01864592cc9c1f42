"""Kernels of others that no CPU has, played by the formula in float64: what goes in and out is what theirs take and give.

Arguments are bound by the real op's schema. Outputs hold NaN where the kernel would leave memory as it was, and backward works
with the log-sum-exp and the output that it is handed, so a wrong form of either shows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# undefined tensors, which torch takes as None
UNDEFINED = {"attn_bias", "cum_seq_q", "cum_seq_k"}
KINDS = {"int": int, "SymInt": int, "float": float, "bool": bool}


class Aten:
    """In the place of torch.ops.aten: every op by its name."""

    def __init__(self, **played: Callable) -> None:
        self.played = played

    def __getattr__(self, name: str) -> Callable:
        schema = getattr(torch.ops.aten, name).default._schema
        return lambda *args, **kwargs: self.played[name](**bound(schema, args, kwargs))


def bound(schema: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument of the schema by name, checked as torch checks it."""
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    assert len(args) <= len(positional), f"{schema.name} takes {len(positional)} arguments by place, got {len(args)}"
    given = dict(zip((argument.name for argument in positional), args, strict=False))
    assert not given.keys() & kwargs.keys()
    given |= kwargs
    for argument in schema.arguments:
        if argument.name not in given:
            assert argument.has_default_value(), f"{schema.name} lacks {argument.name}"
            given[argument.name] = argument.default_value
        value, kind = given[argument.name], str(argument.type)
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]")
        if value is None:
            assert optional or argument.name in UNDEFINED, f"{schema.name}: {argument.name} is None"
        elif kind == "Tensor":
            assert isinstance(value, Tensor), f"{schema.name}: {argument.name} is {value!r}"
        else:
            assert type(value) is KINDS[kind], f"{schema.name}: {argument.name} is {value!r}, not {kind}"
    assert given.keys() == {argument.name for argument in schema.arguments}
    return given


def sequences(q: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[tuple[int, slice, slice]]:
    """The place in the batch, the rows and the keys of each."""
    if cu_q is None:
        yield from ((b, slice(None), slice(None)) for b in range(len(q)))
        return
    assert len(q) == 1
    for i in range(len(cu_q) - 1):
        yield 0, slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of one sequence: q [L,H,D], k and v [K,H,D] -> out [L,H,D], lse [H,L]; without keys NaN and +inf, as memory may be."""
    if not len(k):
        return torch.full_like(q, torch.nan), q.new_full(q.shape[1::-1], torch.inf)
    scores = torch.einsum("lhd,khd->hlk", q, k) * scale
    return torch.einsum("hlk,khd->lhd", scores.softmax(-1), v), scores.logsumexp(-1)


def gradients(grad, q, k, v, out, lse_HL, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Of one sequence, by the log-sum-exp and the output that forward gave."""
    if not len(k):
        return torch.full_like(q, torch.nan), k, v
    p = (torch.einsum("lhd,khd->hlk", q, k) * scale - lse_HL[..., None]).exp()
    delta_HL1 = (grad * out).sum(-1).T[..., None]
    ds = p * (torch.einsum("lhd,khd->hlk", grad, v) - delta_HL1) * scale
    dq, dk = torch.einsum("hlk,khd->lhd", ds, k), torch.einsum("hlk,lhd->khd", ds, q)
    return dq, dk, torch.einsum("hlk,lhd->khd", p, grad)


def efficient() -> Aten:
    """aten's memory-efficient attention over a batch, or over cu_seqlens in a batch of one."""

    def forward(
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
        compute_log_sumexp, scale, seqlen_k, window_size,
    ):  # fmt: skip
        assert (bias, dropout_p, custom_mask_type, compute_log_sumexp, seqlen_k, window_size) == (
            None, 0.0, 0, True, None, None,
        )  # fmt: skip
        longest = query.shape[1] if cu_seqlens_q is None else max_seqlen_q
        assert 0 < longest <= query.shape[1]
        assert max_seqlen_k == max_seqlen_q
        parts = list(sequences(query, cu_seqlens_q, cu_seqlens_k))
        out = query.new_full(query.shape, torch.nan)
        lse = query.new_full((len(parts), query.shape[2], -(-longest // 32) * 32), torch.nan)
        for s, (b, rows, keys) in enumerate(parts):
            out[b, rows], found = attended(query[b, rows], key[b, keys], value[b, keys], scale)
            own = found.shape[1]
            lse[s, :, :own] = found
            lse[s, :, own : -(-own // 32) * 32] = torch.inf
        unused = torch.empty((), dtype=torch.int64)
        return out, lse, unused, unused, longest, longest

    def backward(
        grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
        dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, scale, num_splits_key, window_size,
        shared_storage_dqdkdv,
    ):  # fmt: skip
        assert (bias, dropout_p, custom_mask_type, bias_requires_grad, window_size) == (None, 0.0, 0, False, None)
        assert max_seqlen_q == max_seqlen_k <= query.shape[1]
        parts = list(sequences(query, cu_seqlens_q, cu_seqlens_k))
        assert logsumexp.is_contiguous()
        assert logsumexp.shape == (len(parts), query.shape[2], -(-max_seqlen_q // 32) * 32)
        assert out.is_contiguous()
        batch, rows_of_all, heads, dim = query.shape
        if shared_storage_dqdkdv:
            dq, dk, dv = query.new_full((batch, rows_of_all, 3, heads, dim), torch.nan).unbind(2)
        else:
            dq, dk, dv = (torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (query, key, value))
        for s, (b, rows, keys) in enumerate(parts):
            own = len(query[b, rows])
            assert (logsumexp[s, :, own:] == torch.inf).all(), "rows that are none must weigh nothing"
            given = grad_out_[b, rows], query[b, rows], key[b, keys], value[b, keys], out[b, rows]
            dq[b, rows], dk[b, keys], dv[b, keys] = gradients(*given, logsumexp[s, :, :own], scale)
        return dq, dk, dv, torch.empty(())

    return Aten(_efficient_attention_forward=forward, _efficient_attention_backward=backward)


def cudnn() -> Aten:
    """aten's attention by cuDNN: q, k, v as [S,H,L,D], the log-sum-exp as [S,H,L,1]."""

    def forward(
        query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale
    ):  # fmt: skip
        assert (attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask) == (
            None,
            True,
            0.0,
            False,
            False,
        )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        outs, lses = zip(*(attended(*one, scale) for one in zip(q, k, v, strict=True)), strict=True)
        unused, length = torch.empty((), dtype=torch.int64), query.shape[2]
        # as aten lays out its output: like the query
        return (
            torch.stack(outs).transpose(1, 2), torch.stack(lses).unsqueeze(-1), None, None, length, length, unused, unused, None
        )  # fmt: skip

    def backward(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
        max_k, dropout_p, is_causal, scale,
    ):  # fmt: skip
        assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p, is_causal) == (None, None, None, 0.0, False)
        assert max_q == max_k == query.shape[2]
        assert logsumexp.shape == (*query.shape[:3], 1)
        assert logsumexp.is_contiguous()
        assert out.stride() == torch.empty_like(query).stride()
        grads = [
            gradients(*(x[s].transpose(0, 1) for x in (grad_out, query, key, value, out)), logsumexp[s, :, :, 0], scale)
            for s in range(len(query))
        ]
        return tuple(torch.stack(each).transpose(1, 2) for each in zip(*grads, strict=True))

    return Aten(_scaled_dot_product_cudnn_attention=forward, _scaled_dot_product_cudnn_attention_backward=backward)

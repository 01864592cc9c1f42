"""Packed attention in Triton: everything a (sequence, head) needs is read once and written once, where it fits on chip.

Three length classes, each a launch of its own; a program whose sequence belongs to another class ends at once, so a
batch of 197 and 37 tokens costs two launches and no padding beyond the class:

* up to 64 tokens, and with head dims 32 and 64 up to 256: resident. One program holds K and V of a (sequence, head),
  as pieces whose sizes are powers of two (197 keys: 128 + 64 + 16), and walks over its queries. Forward is a softmax
  in a single pass. Backward forms each score once: dK and dV stay in registers for all keys, so dQ of a tile of queries
  is complete at once. Where no sequence has more than 32 tokens, a program takes neighbouring sequences together.
* beyond: streaming. Forward walks over keys with a running softmax. Backward is one launch with two roles, blocks of
  keys (dK, dV) and blocks of queries (dQ).

No atomics and no order that may change: results are the same bits every time. Head dims 80 and 96 are kept as 64 + 16
and 64 + 32 columns, not padded to 128. fp32 always streams, with products of full precision (ieee). In 16 bit the
probabilities and their gradients are rounded to the input's dtype before they are multiplied again.

T packed tokens, S sequences, H heads, D head dim; inside a program M queries, N keys.
"""

from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.interpreter  # noqa: F401
from kernels.compiled import Variant, chip_class
from kernels.packed_attention.tiles import (
    GROUPED_DIMS,
    HEAD_DIM_BLOCKS,
    SPILLS,
    Config,
    Form,
    config,
    key_pieces,
    ladder,
)


@triton.constexpr_function
def _total(sizes):
    return sum(sizes)


@triton.constexpr_function
def _before(sizes, i):
    return sum(sizes[:i])


@triton.constexpr_function
def _size(sizes, i):
    return sizes[i]


_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


# A matrix with D columns is a tuple of column blocks, so that no head dim is padded to a power of two.


@triton.jit
def _load(pointer, rows_M, stride, keep_M, DIMS: tl.constexpr):
    blocks = ()
    for i in tl.static_range(len(DIMS)):
        place_MD = rows_M[:, None] * stride + (_before(DIMS, i) + tl.arange(0, DIMS[i]))[None, :]
        blocks += (tl.load(pointer + place_MD, mask=keep_M[:, None], other=0.0),)
    return blocks


@triton.jit
def _store(pointer, rows_M, stride, keep_M, blocks, factor, DIMS: tl.constexpr):
    for i in tl.static_range(len(DIMS)):
        place_MD = rows_M[:, None] * stride + (_before(DIMS, i) + tl.arange(0, DIMS[i]))[None, :]
        tl.store(pointer + place_MD, (blocks[i] * factor).to(pointer.dtype.element_ty), mask=keep_M[:, None])


@triton.jit
def _zeros(M: tl.constexpr, DIMS: tl.constexpr):
    blocks = ()
    for i in tl.static_range(len(DIMS)):
        blocks += (tl.zeros((M, _size(DIMS, i)), tl.float32),)
    return blocks


@triton.jit
def _inner(a_MD, b_ND):
    """a b^T, [M, N]."""
    product = tl.dot(a_MD[0], tl.trans(b_ND[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a_MD)):
        product = tl.dot(a_MD[i], tl.trans(b_ND[i]), product, input_precision="ieee")
    return product


@triton.jit
def _add_product(sum_MD, a_MN, b_ND):
    """sum + a b."""
    blocks = ()
    for i in tl.static_range(len(b_ND)):
        blocks += (tl.dot(a_MN, b_ND[i], sum_MD[i], input_precision="ieee"),)
    return blocks


@triton.jit
def _scaled(a_MD, factor_M):
    blocks = ()
    for i in tl.static_range(len(a_MD)):
        blocks += (a_MD[i] * factor_M[:, None],)
    return blocks


@triton.jit
def _row_dot(a_MD, b_MD):
    total_M = tl.sum(a_MD[0].to(tl.float32) * b_MD[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a_MD)):
        total_M += tl.sum(a_MD[i].to(tl.float32) * b_MD[i].to(tl.float32), 1)
    return total_M


@triton.jit
def _place(cu_seqlens, kv_lengths, all_keys, sequence, last):
    """First token of the sequences from `sequence` to before `last`, their tokens, keys of the first of them.

    Without kv_lengths its pointer is cu_seqlens and all_keys is 1: one compiled form serves both.
    """
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + last) - start
    keys = tl.load(kv_lengths + sequence + all_keys) - all_keys * start
    return start, length, keys


@triton.jit
def _neighbours(cu_seqlens, kv_lengths, all_keys, heads, sequences, count):
    """`_place` of the sequences of a resident program, `count` neighbours, and what `_group` wants to know of them."""
    first = tl.program_id(0) // heads * count
    start, length, keys = _place(cu_seqlens, kv_lengths, all_keys, first, tl.minimum(first + count, sequences))
    return start, length, keys, (cu_seqlens, kv_lengths, all_keys, first, sequences, count, start, length, keys)


@triton.jit
def _group(neighbours, rows_M):
    """Which of the neighbouring sequences each row belongs to, and whether it is a key there."""
    cu_seqlens, kv_lengths, all_keys, first, sequences, count, start, length, keys = neighbours
    member_M = rows_M * 0
    is_key_M = rows_M < keys
    for i in range(1, count):
        sequence = tl.minimum(first + i, sequences - 1)
        begin = tl.load(cu_seqlens + sequence)
        kept = tl.load(kv_lengths + sequence + all_keys) - all_keys * begin
        inside_M = rows_M >= begin - start
        member_M = tl.where(inside_M, i, member_M)
        is_key_M = tl.where(inside_M, rows_M - (begin - start) < kept, is_key_M)
    return member_M, is_key_M & (rows_M < length)


@triton.jit
def _asked(neighbours, row_M, key_N):
    """Whether a query asks a key, [M, N], among neighbouring sequences."""
    member_M, _ = _group(neighbours, row_M)
    member_N, is_key_N = _group(neighbours, key_N)
    return (member_M[:, None] == member_N[None, :]) & is_key_N[None, :]


@triton.jit
def _load_pieces(key, part_stride, token_stride, keys, neighbours, DIMS, PIECES, GROUPED: tl.constexpr):
    """Keys and values of a resident program."""
    k = ()
    v = ()
    for i in tl.static_range(len(PIECES)):
        key_N = _before(PIECES, i) + tl.arange(0, PIECES[i])
        # grouped: what lies behind a member's keys is another member's, or asked by nobody and kept out here
        keep_N = key_N < keys
        if GROUPED:
            keep_N = _group(neighbours, key_N)[1]
        k += (_load(key, key_N, token_stride, keep_N, DIMS),)
        v += (_load(key + part_stride, key_N, token_stride, keep_N, DIMS),)
    return k, v


@triton.jit
def _store_forward(out, lse, row_M, row, keep_M, sum_MD, highest_M, total_M, DIMS: tl.constexpr):
    """The output and its log-sum-exp, from the sum over keys and the highest score, in powers of 2."""
    has_keys_M = total_M > 0
    total_M = tl.where(has_keys_M, total_M, 1.0)
    _store(out, row_M, row, keep_M, sum_MD, (1 / total_M)[:, None], DIMS)
    lse_M = tl.where(has_keys_M, (highest_M + tl.log2(total_M)) * _LN_2, float("-inf"))
    tl.store(lse + row_M, lse_M, mask=keep_M)


@triton.jit
def _load_backward(query, grad_out, out, lse, row_M, token_stride, grad_token_stride, row, keep_M, DIMS: tl.constexpr):
    """Of some queries themselves, the gradient of their output, its product with the output, their log-sum-exp."""
    q = _load(query, row_M, token_stride, keep_M, DIMS)
    do = _load(grad_out, row_M, grad_token_stride, keep_M, DIMS)
    delta_M = _row_dot(do, _load(out, row_M, row, keep_M, DIMS))
    return q, do, delta_M, tl.load(lse + row_M, mask=keep_M, other=0.0) * _LOG2_E


_NOT_SPECIALISED = ["tokens", "heads", "sequences", "count", "all_keys", "longer_than", "blocks"]
# read one element at a time: their alignment, which a slice changes, must not make another compiled form
_SCALAR_POINTERS = ["cu_seqlens", "kv_lengths"]


@triton.jit(do_not_specialize=_NOT_SPECIALISED, do_not_specialize_on_alignment=_SCALAR_POINTERS)
def _forward_resident(
    qkv,
    out,
    lse,
    cu_seqlens,
    kv_lengths,
    scale,
    token_stride,
    part_stride,
    head_stride,
    tokens,
    heads,
    sequences,
    count,
    all_keys,
    longer_than,
    DIMS: tl.constexpr,
    PIECES: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    start, length, keys, neighbours = _neighbours(cu_seqlens, kv_lengths, all_keys, heads, sequences, count)
    if (length <= longer_than) | (length > _total(PIECES)):
        return
    first = start.to(tl.int64)
    row = heads * _total(DIMS)
    query = qkv + first * token_stride + head * head_stride
    out += first * row + head * _total(DIMS)
    lse += head * tokens + first
    k, v = _load_pieces(query + part_stride, part_stride, token_stride, keys, neighbours, DIMS, PIECES, GROUPED)
    for at in tl.range(0, length, ROWS, num_stages=STAGES):
        row_M = at + tl.arange(0, ROWS)
        keep_M = row_M < length
        q = _load(query, row_M, token_stride, keep_M, DIMS)
        scores = ()
        highest_M = tl.full((ROWS,), float("-inf"), tl.float32)
        for i in tl.static_range(len(PIECES)):
            key_N = _before(PIECES, i) + tl.arange(0, PIECES[i])
            asked = (key_N < keys)[None, :]
            if GROUPED:
                asked = _asked(neighbours, row_M, key_N)
            score_MN = tl.where(asked, _inner(q, k[i]) * (scale * _LOG2_E), float("-inf"))
            highest_M = tl.maximum(highest_M, tl.max(score_MN, 1))
            scores += (score_MN,)
        # without keys all scores are -inf; their difference would be NaN
        highest_M = tl.where(highest_M == float("-inf"), 0.0, highest_M)
        total_M = tl.zeros((ROWS,), tl.float32)
        sum_MD = _zeros(ROWS, DIMS)
        for i in tl.static_range(len(PIECES)):
            p_MN = tl.exp2(scores[i] - highest_M[:, None])
            total_M += tl.sum(p_MN, 1)
            sum_MD = _add_product(sum_MD, p_MN.to(qkv.dtype.element_ty), v[i])
        _store_forward(out, lse, row_M, row, keep_M, sum_MD, highest_M, total_M, DIMS)


@triton.jit(do_not_specialize=_NOT_SPECIALISED, do_not_specialize_on_alignment=_SCALAR_POINTERS)
def _backward_resident(
    grad_out,
    qkv,
    out,
    lse,
    grad_qkv,
    cu_seqlens,
    kv_lengths,
    scale,
    grad_token_stride,
    grad_head_stride,
    token_stride,
    part_stride,
    head_stride,
    tokens,
    heads,
    sequences,
    count,
    all_keys,
    longer_than,
    DIMS: tl.constexpr,
    PIECES: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    start, length, keys, neighbours = _neighbours(cu_seqlens, kv_lengths, all_keys, heads, sequences, count)
    if (length <= longer_than) | (length > _total(PIECES)):
        return
    last_key = keys
    if GROUPED:
        last_key = length
    first = start.to(tl.int64)
    row = heads * _total(DIMS)
    query = qkv + first * token_stride + head * head_stride
    grad_out += first * grad_token_stride + head * grad_head_stride
    out += first * row + head * _total(DIMS)
    lse += head * tokens + first
    grad_query = grad_qkv + first * 3 * row + head * _total(DIMS)
    k, v = _load_pieces(query + part_stride, part_stride, token_stride, keys, neighbours, DIMS, PIECES, GROUPED)
    dk = ()
    dv = ()
    for i in tl.static_range(len(PIECES)):
        dk += (_zeros(_size(PIECES, i), DIMS),)
        dv += (_zeros(_size(PIECES, i), DIMS),)
    for at in tl.range(0, length, ROWS, num_stages=STAGES):
        row_M = at + tl.arange(0, ROWS)
        keep_M = row_M < length
        q, do, delta_M, lse_M = _load_backward(
            query, grad_out, out, lse, row_M, token_stride, grad_token_stride, row, keep_M, DIMS
        )
        dq = _zeros(ROWS, DIMS)
        next_dk = ()
        next_dv = ()
        for i in tl.static_range(len(PIECES)):
            dk_ND = dk[i]
            dv_ND = dv[i]
            # a piece behind the last key is skipped; the branch also keeps one piece's registers from the next one's
            if _before(PIECES, i) < last_key:
                place_N = _before(PIECES, i) + tl.arange(0, PIECES[i])
                asked = (place_N < keys)[:, None]
                if GROUPED:
                    asked = _asked(neighbours, row_M, place_N).trans()
                # transposed scores: p and ds are then left operands of dv and dk as they are
                score_NM = _inner(k[i], q) * (scale * _LOG2_E)
                p_NM = tl.exp2(tl.where(asked, score_NM - lse_M[None, :], float("-inf")))
                dv_ND = _add_product(dv_ND, p_NM.to(qkv.dtype.element_ty), do)
                ds_NM = (p_NM * (_inner(v[i], do) - delta_M[None, :])).to(qkv.dtype.element_ty)
                dk_ND = _add_product(dk_ND, ds_NM, q)
                dq = _add_product(dq, tl.trans(ds_NM), k[i])
            next_dk += (dk_ND,)
            next_dv += (dv_ND,)
        dk = next_dk
        dv = next_dv
        _store(grad_query, row_M, 3 * row, keep_M, dq, scale, DIMS)
    for i in tl.static_range(len(PIECES)):
        key_N = _before(PIECES, i) + tl.arange(0, PIECES[i])
        _store(grad_query + row, key_N, 3 * row, key_N < length, dk[i], scale, DIMS)
        _store(grad_query + 2 * row, key_N, 3 * row, key_N < length, dv[i], 1.0, DIMS)


@triton.jit(do_not_specialize=_NOT_SPECIALISED, do_not_specialize_on_alignment=_SCALAR_POINTERS)
def _forward_streaming(
    qkv,
    out,
    lse,
    cu_seqlens,
    kv_lengths,
    scale,
    token_stride,
    part_stride,
    head_stride,
    tokens,
    heads,
    blocks,
    all_keys,
    longer_than,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    pair = tl.program_id(0) // blocks
    row_M = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    head = (pair % heads).to(tl.int64)
    start, length, keys = _place(cu_seqlens, kv_lengths, all_keys, pair // heads, pair // heads + 1)
    if (length <= longer_than) | (length <= tl.program_id(0) % blocks * ROWS):
        return
    first = start.to(tl.int64)
    row = heads * _total(DIMS)
    query = qkv + first * token_stride + head * head_stride
    keep_M = row_M < length
    q = _load(query, row_M, token_stride, keep_M, DIMS)
    highest_M = tl.full((ROWS,), float("-inf"), tl.float32)
    total_M = tl.zeros((ROWS,), tl.float32)
    sum_MD = _zeros(ROWS, DIMS)
    for at in range(0, keys, STEP):
        key_N = at + tl.arange(0, STEP)
        k = _load(query + part_stride, key_N, token_stride, key_N < keys, DIMS)
        v = _load(query + part_stride + part_stride, key_N, token_stride, key_N < keys, DIMS)
        score_MN = tl.where((key_N < keys)[None, :], _inner(q, k) * (scale * _LOG2_E), float("-inf"))
        # every step has at least one key, so this is finite from the first on
        higher_M = tl.maximum(highest_M, tl.max(score_MN, 1))
        fade_M = tl.exp2(highest_M - higher_M)
        p_MN = tl.exp2(score_MN - higher_M[:, None])
        total_M = total_M * fade_M + tl.sum(p_MN, 1)
        sum_MD = _add_product(_scaled(sum_MD, fade_M), p_MN.to(qkv.dtype.element_ty), v)
        highest_M = higher_M
    out += first * row + head * _total(DIMS)
    _store_forward(out, lse + head * tokens + first, row_M, row, keep_M, sum_MD, highest_M, total_M, DIMS)


@triton.jit(do_not_specialize=_NOT_SPECIALISED, do_not_specialize_on_alignment=_SCALAR_POINTERS)
def _backward_streaming(
    grad_out,
    qkv,
    out,
    lse,
    grad_qkv,
    cu_seqlens,
    kv_lengths,
    scale,
    grad_token_stride,
    grad_head_stride,
    token_stride,
    part_stride,
    head_stride,
    tokens,
    heads,
    blocks,
    all_keys,
    longer_than,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    # the even programs of a (sequence, head) own keys, the odd ones queries
    pair = tl.program_id(0) // (2 * blocks)
    block = tl.program_id(0) % (2 * blocks) // 2
    head = (pair % heads).to(tl.int64)
    start, length, keys = _place(cu_seqlens, kv_lengths, all_keys, pair // heads, pair // heads + 1)
    if (length <= longer_than) | (length <= block * ROWS):
        return
    first = start.to(tl.int64)
    row = heads * _total(DIMS)
    query = qkv + first * token_stride + head * head_stride
    key = query + part_stride
    value = key + part_stride
    grad_out += first * grad_token_stride + head * grad_head_stride
    out += first * row + head * _total(DIMS)
    lse += head * tokens + first
    grad_query = grad_qkv + first * 3 * row + head * _total(DIMS)
    own = block * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) % 2 == 0:
        is_key_N = own < keys
        k = _load(key, own, token_stride, is_key_N, DIMS)
        v = _load(value, own, token_stride, is_key_N, DIMS)
        dk = _zeros(ROWS, DIMS)
        dv = _zeros(ROWS, DIMS)
        # a block that holds no key has no query to ask it
        for at in range(0, tl.where(block * ROWS < keys, length, 0), STEP):
            row_M = at + tl.arange(0, STEP)
            keep_M = row_M < length
            q, do, delta_M, lse_M = _load_backward(
                query, grad_out, out, lse, row_M, token_stride, grad_token_stride, row, keep_M, DIMS
            )
            score_NM = _inner(k, q) * (scale * _LOG2_E)
            p_NM = tl.exp2(tl.where(is_key_N[:, None], score_NM - lse_M[None, :], float("-inf")))
            dv = _add_product(dv, p_NM.to(qkv.dtype.element_ty), do)
            ds_NM = p_NM * (_inner(v, do) - delta_M[None, :])
            dk = _add_product(dk, ds_NM.to(qkv.dtype.element_ty), q)
        _store(grad_query + row, own, 3 * row, own < length, dk, scale, DIMS)
        _store(grad_query + 2 * row, own, 3 * row, own < length, dv, 1.0, DIMS)
    else:
        keep_M = own < length
        q, do, delta_M, lse_M = _load_backward(
            query, grad_out, out, lse, own, token_stride, grad_token_stride, row, keep_M, DIMS
        )
        dq = _zeros(ROWS, DIMS)
        for at in range(0, keys, STEP):
            key_N = at + tl.arange(0, STEP)
            k = _load(key, key_N, token_stride, key_N < keys, DIMS)
            v = _load(value, key_N, token_stride, key_N < keys, DIMS)
            score_MN = _inner(q, k) * (scale * _LOG2_E)
            p_MN = tl.exp2(tl.where((key_N < keys)[None, :], score_MN - lse_M[:, None], float("-inf")))
            ds_MN = p_MN * (_inner(do, v) - delta_M[:, None])
            dq = _add_product(dq, ds_MN.to(qkv.dtype.element_ty), k)
        _store(grad_query, own, 3 * row, keep_M, dq, scale, DIMS)


_KERNELS = {
    ("forward", True): _forward_resident,
    ("forward", False): _forward_streaming,
    ("backward", True): _backward_resident,
    ("backward", False): _backward_streaming,
}


def forward(
    qkv_T3HD: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.packed_attention`; returns (out [T,H,D], lse fp32 [H,T]). ValueError for fp64."""
    tokens, _, heads, dim = qkv_T3HD.shape
    out_THD = qkv_T3HD.new_empty(tokens, heads, dim)
    lse_HT = qkv_T3HD.new_empty(heads, tokens, dtype=torch.float32)
    qkv_T3HD = _addressable(qkv_T3HD, max_seqlen)
    tensors = (qkv_T3HD, out_THD, lse_HT)
    _launch("forward", tensors, qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths, scale, qkv_T3HD.stride()[:3])
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
    """Gradient of qkv, [T,3,H,D] contiguous. ValueError for fp64."""
    qkv_T3HD, grad_out_THD = _addressable(qkv_T3HD, max_seqlen), _addressable(grad_out_THD, max_seqlen)
    grad_T3HD = qkv_T3HD.new_empty(qkv_T3HD.shape)
    tensors = (grad_out_THD, qkv_T3HD, out_THD.contiguous(), lse_HT.contiguous(), grad_T3HD)
    strides = (*grad_out_THD.stride()[:2], *qkv_T3HD.stride()[:3])
    _launch("backward", tensors, qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths, scale, strides)
    return grad_T3HD


def variants(capability: int) -> list[Variant]:
    """What launches on a chip of this compute capability ask for: every form in bf16 (fp16 is the same code), and
    fp32."""
    found = []
    for direction in ("forward", "backward"):
        for dim in HEAD_DIM_BLOCKS:
            resident = key_pieces(direction, dim, torch.bfloat16, capability)
            forms = [Form(sizes) for sizes in (*resident, ())]
            if dim in GROUPED_DIMS:
                forms.append(Form((64,), grouped=True))
            found += [_variant(direction, form, dim, torch.bfloat16, capability) for form in forms]
            found.append(_variant(direction, Form(()), dim, torch.float32, capability))
    return found


def _variant(direction: str, form: Form, dim: int, dtype: torch.dtype, capability: int) -> Variant:
    chosen = config(direction, form, dim, dtype, capability)
    kernel, constants = _KERNELS[direction, bool(form.pieces)], _constants(form, dim, dtype, chosen)
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    pointers = dict.fromkeys(("grad_out", "qkv", "out", "grad_qkv"), f"*{element}")
    pointers |= {"lse": "*fp32", "cu_seqlens": "*i32", "kv_lengths": "*i32"}
    types = {"scale": "fp32", **pointers, **dict.fromkeys(constants, "constexpr")}
    keys = "grouped" if form.grouped else "+".join(map(str, form.pieces)) or "streaming"
    return Variant(
        name=f"{direction} {element} D={dim} keys={keys} rows={chosen.rows}",
        kernel=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constants=constants,
        warps=chosen.warps,
        stages=chosen.stages,
        aligned=tuple(
            name
            for name in kernel.arg_names
            if name.endswith("stride") or name in pointers.keys() - set(_SCALAR_POINTERS)
        ),
        matrix=dtype != torch.float32,
        spills=SPILLS.get((direction, dim, form.pieces), {}) if form.pieces or dtype == torch.float32 else {},
    )


def _launch(direction, tensors, qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths, scale, strides) -> None:
    tokens, _, heads, dim = qkv_T3HD.shape
    sequences = cu_seqlens.shape[0] - 1
    if qkv_T3HD.dtype == torch.float64:
        raise ValueError("packed_attention in Triton takes float16, bfloat16 or float32, got float64; use reference")
    if tokens == 0 or heads == 0:
        return
    all_keys = kv_lengths is None
    layout = (cu_seqlens, cu_seqlens if all_keys else kv_lengths, scale, *strides, tokens, heads)
    equal = sequences * max_seqlen == tokens
    with torch.cuda.device_of(qkv_T3HD):
        for step in _plan(direction, dim, qkv_T3HD.dtype, max_seqlen, equal, _capability(qkv_T3HD.device)):
            programs, shape = heads * sequences * step.blocks * step.roles, (step.blocks,)
            if step.count:
                programs, shape = heads * -(-sequences // step.count), (sequences, step.count)
            step.kernel[(programs,)](*tensors, *layout, *shape, int(all_keys), step.longer_than, **step.options)


class _Launch(NamedTuple):
    """A kernel for one length class: a resident program takes `count` sequences of a head; with a count of 0 a
    (sequence, head) is divided among programs, one per block of rows and role."""

    kernel: Any
    options: dict[str, Any]
    longer_than: int
    count: int
    blocks: int
    roles: int


@lru_cache(4096)
def _plan(
    direction: str, dim: int, dtype: torch.dtype, max_seqlen: int, equal: bool, capability: int
) -> tuple[_Launch, ...]:
    """The launches that serve a batch, longest class first, so that the shorter ones fill the gaps."""
    launches = []
    forms = ladder(direction, dim, dtype, capability, max_seqlen, equal)
    for form, shorter in zip_longest(forms, forms[1:]):
        chosen = config(direction, form, dim, dtype, capability)
        launches.append(
            _Launch(
                kernel=_KERNELS[direction, bool(form.pieces)],
                options=_constants(form, dim, dtype, chosen) | {"num_warps": chosen.warps, "num_stages": chosen.stages},
                longer_than=shorter.capacity if shorter else 0,
                count=0 if not form.pieces else form.capacity // max_seqlen if form.grouped else 1,
                blocks=-(-max_seqlen // chosen.rows),
                roles=2 if direction == "backward" else 1,
            )
        )
    return tuple(launches)


def _constants(form: Form, dim: int, dtype: torch.dtype, chosen: Config) -> dict[str, Any]:
    if form.pieces:
        own = {"PIECES": form.pieces, "GROUPED": form.grouped, "STAGES": chosen.stages}
    else:
        own = {"STEP": chosen.step}
    return {
        "DIMS": (64, 64) if dim == 128 and dtype == torch.float32 else HEAD_DIM_BLOCKS[dim],
        "ROWS": chosen.rows,
        **own,
    }


@cache
def _capability(device: torch.device) -> int:
    """Whose tiles a device takes; those of sm_80 where kernels are interpreted."""
    return chip_class(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else 80


def _addressable(x: Tensor, max_seqlen: int) -> Tensor:
    """Rows of contiguous heads, whose distances inside a sequence fit in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(0) * max_seqlen < 2**31 else x.contiguous()

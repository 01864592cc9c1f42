"""Softmax attention inside each sequence of a packed batch, forward and backward as one op each.

T packed tokens, S sequences, H heads, D head dim.

Why an op: the compiler cannot keep sequences of different lengths apart without padding them, and at the lengths of
ViTs (37 to 257) attention is bound by memory, so what counts is to read q, k, v once from the packed tensor and write
once. Floor per token and head in 16 bit: 8 D bytes and 4 N D flops forward, 16 D bytes and 10 N D flops backward (see
`cost`). Existing kernels move 3 to 4.6 times that backward, through a padded fp32 dq and a pre- and a post-pass.

Every implementation is a module with these two functions, which lets Triton and CUDA versions join without touching
    this file: forward(qkv[T,3,H,D], cu_seqlens, max_seqlen, kv_lengths, scale) -> (out[T,H,D], lse[H,T])
    backward(grad_out[T,H,D], qkv, out, lse, cu_seqlens, max_seqlen, kv_lengths, scale) -> grad_qkv[T,3,H,D]
lse is the log-sum-exp of a query's scaled scores, in fp64 for fp64 input, else fp32; -inf where a query has no key.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.checks import DTYPES, checks_values
from kernels.choice import AUTO, chosen, load, resolved
from kernels.cost import Cost
from kernels.packed_attention import layout
from kernels.registration import implement, name_of

HEAD_DIMS = (32, 64, 80, 96, 128)

_LAYOUT = "Tensor cu_seqlens, SymInt max_seqlen, Tensor? kv_lengths, float scale, str implementation"
torch.library.define("tessera::packed_attention_forward", f"(Tensor qkv, {_LAYOUT}) -> (Tensor, Tensor)")
torch.library.define(
    "tessera::packed_attention_backward", f"(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_LAYOUT}) -> Tensor"
)


def packed_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention inside each of S sequences that lie back to back; no token sees another sequence.

    Args:
        qkv: [T, 3, H, D], fp16, bf16, fp32 or fp64; D one of 32, 64, 80, 96, 128. Any strides.
        cu_seqlens: int32 [S+1] on the same device, from 0 to T, not decreasing; sequence s is rows cu_seqlens[s] to
            cu_seqlens[s+1]. The values of it and of kv_lengths are checked on the CPU, and with TESSERA_DEBUG=1 in the
            environment on a GPU as well, which is waited for; otherwise a GPU trusts them.
        max_seqlen: length of the longest sequence.
        kv_lengths: int32 [S]; only the first kv_lengths[s] tokens of sequence s are keys, so the masked tokens that
            follow the visible ones ask and are never asked. None: all are. A sequence without keys gives zeros.
        scale: factor on the scores; None is D ** -0.5.

    Returns:
        [T, H, D] in the dtype of qkv, contiguous. Differentiable in qkv, once; keys beyond kv_lengths get zero
        gradient.

    Raises:
        ValueError: for a shape, dtype or device that is not the above.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"packed_attention needs qkv of shape [tokens, 3, heads, head dim], got {list(qkv.shape)}")
    if qkv.shape[3] not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"packed_attention needs qkv with a head dim of {dims}, got {qkv.shape[3]}")
    if qkv.dtype not in DTYPES:
        raise ValueError(f"packed_attention needs qkv in float16, bfloat16, float32 or float64, got {qkv.dtype}")
    _check_int32("cu_seqlens", cu_seqlens, qkv.device)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("packed_attention needs cu_seqlens of at least one element, got none")
    if kv_lengths is not None:
        _check_int32("kv_lengths", kv_lengths, qkv.device)
        sequences, given = cu_seqlens.shape[0] - 1, kv_lengths.shape[0]
        if given != sequences:
            raise ValueError(
                f"packed_attention needs one entry of kv_lengths per sequence, got {given} for {sequences}"
            )
        kv_lengths = kv_lengths.contiguous()
    # kernels step through both one int32 at a time
    cu_seqlens = cu_seqlens.contiguous()
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    # which one auto means is left to the registered ops: they know the lengths, and each direction has its own answer
    implementation = chosen("packed_attention", qkv.device)
    return torch.ops.tessera.packed_attention_forward(qkv, cu_seqlens, max_seqlen, kv_lengths, scale, implementation)[0]


def cost(
    lengths: Sequence[int], heads: int, head_dim: int, element_size: int, key_lengths: Sequence[int] | None = None
) -> tuple[Cost, Cost]:
    """Floor of forward and of backward for sequences of these lengths, of which key_lengths are keys (None: all)."""
    keys = lengths if key_lengths is None else key_lengths
    row = heads * head_dim * element_size
    lse = 4 * heads * sum(lengths)
    pairs = heads * head_dim * sum(q * k for q, k in zip(lengths, keys, strict=True))
    asked, all_rows = 2 * sum(keys), 2 * sum(lengths)
    forward = Cost((all_rows + asked) * row + lse, 4 * pairs)
    # q, out, grad_out and kept k, v are read; a gradient is written for every row, zeros for the keys never asked
    # included
    backward = Cost((3 * sum(lengths) + asked + 3 * sum(lengths)) * row + lse, 10 * pairs)
    return forward, backward


def _check_int32(name: str, value: Tensor, device: torch.device) -> None:
    if value.ndim != 1 or value.dtype != torch.int32 or value.device != device:
        raise ValueError(
            f"packed_attention needs {name} as int32 [n] on {device}, "
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )


def _shape_class(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None, *_: object) -> str:
    """dtype, head dim and longest sequence; whether others are shorter, and whether some tokens are no keys."""
    mixed = (len(cu_seqlens) - 1) * max_seqlen != len(qkv)
    return f"{name_of(qkv.dtype)} D{qkv.shape[3]} L{max_seqlen}" + " mixed" * mixed + " keys" * (kv_lengths is not None)


def _backward_shape_class(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *layout: Any) -> str:
    return _shape_class(qkv, *layout)


@implement("tessera::packed_attention_forward", _shape_class)
def _forward(qkv, cu_seqlens, max_seqlen, kv_lengths, scale, implementation):
    if implementation == AUTO:
        shape_class = _shape_class(qkv, cu_seqlens, max_seqlen, kv_lengths)
        implementation = resolved("packed_attention_forward", shape_class)
    on_cpu = cu_seqlens.device.type == "cpu"
    # on the CPU the reference reads the layout itself
    if checks_values(cu_seqlens.device) and not (on_cpu and implementation == "reference"):
        layout.read(len(qkv), cu_seqlens, max_seqlen, kv_lengths)
    return load("packed_attention", implementation).forward(qkv, cu_seqlens, max_seqlen, kv_lengths, scale)


@implement("tessera::packed_attention_backward", _backward_shape_class)
def _backward(grad_out, qkv, out, lse, cu_seqlens, max_seqlen, kv_lengths, scale, implementation):
    if implementation == AUTO:
        shape_class = _shape_class(qkv, cu_seqlens, max_seqlen, kv_lengths)
        implementation = resolved("packed_attention_backward", shape_class)
    # forward has checked the layout, and autograd hands back no tensor that was written to since
    backward = load("packed_attention", implementation).backward
    return backward(grad_out, qkv, out, lse, cu_seqlens, max_seqlen, kv_lengths, scale)


@torch.library.register_fake("tessera::packed_attention_forward")
def _forward_fake(qkv, cu_seqlens, max_seqlen, kv_lengths, scale, implementation):
    tokens, _, heads, dim = qkv.shape
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=lse_dtype)


@torch.library.register_fake("tessera::packed_attention_backward")
def _backward_fake(grad_out, qkv, out, lse, cu_seqlens, max_seqlen, kv_lengths, scale, implementation):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, cu_seqlens, max_seqlen, kv_lengths, scale, implementation = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, kv_lengths)
    ctx.plain = (max_seqlen, scale, implementation)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, grad_out, _grad_lse):
    qkv, out, lse, cu_seqlens, kv_lengths = ctx.saved_tensors
    max_seqlen, scale, implementation = ctx.plain
    grad_qkv = torch.ops.tessera.packed_attention_backward(
        grad_out, qkv, out, lse, cu_seqlens, max_seqlen, kv_lengths, scale, implementation
    )
    return grad_qkv, None, None, None, None, None


torch.library.register_autograd("tessera::packed_attention_forward", _differentiate, setup_context=_save)

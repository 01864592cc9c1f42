"""xformers, of which nothing is installed: its names as of release 0.0.35, and flash attention by the formula in float64."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.kernels.played import attended, gradients, sequences


@dataclass
class _SeqLenInfo:
    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]


@dataclass
class BlockDiagonalMask:
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Any = None


def operators(name: str, present: bool, lowest: int, capabilities: tuple) -> tuple[type, type]:
    """A forward and a backward operator."""
    made = {
        "NAME": name, "is_available": classmethod(lambda cls: present), "SUPPORTED_MIN_K": lowest, "SUPPORTED_MAX_K": 256,
        "CUDA_MINIMUM_COMPUTE_CAPABILITY": capabilities[0], "CUDA_MAXIMUM_COMPUTE_CAPABILITY": capabilities[1],
    }  # fmt: skip
    return type("FwOp", (), made), type("BwOp", (), made)


def modules(flash: str = "fa2F@2.8.3", flash3: bool = True) -> dict[str, ModuleType]:
    """By name, for sys.modules: with these kernels. `used` of the fmha module lists the operators that ran."""
    found = {
        name: ModuleType(f"xformers{name}")
        for name in ("", ".ops", ".ops.fmha", ".ops.fmha.attn_bias", ".ops.fmha.flash", ".ops.fmha.flash3")
    }
    fmha, biases = found[".ops.fmha"], found[".ops.fmha.attn_bias"]
    found[".ops"].fmha = fmha
    fmha.attn_bias, fmha.flash, fmha.flash3 = biases, found[".ops.fmha.flash"], found[".ops.fmha.flash3"]
    biases._SeqLenInfo, biases.BlockDiagonalMask = _SeqLenInfo, BlockDiagonalMask
    fmha.flash.FwOp, fmha.flash.BwOp = operators(flash or "fa2F@0.0.0", bool(flash), 0, ((8, 0), None))
    fmha.flash3.FwOp, fmha.flash3.BwOp = operators("fa3F@pip_pkg", flash3, 64, ((8, 0), (9, 0)))
    fmha.used = []

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert p == 0.0
        fmha.used.append(op)
        parts = list(sequences(query, *_starts(attn_bias)))
        out = query.new_full(query.shape, torch.nan)
        lse = query.new_full((len(query), query.shape[2], query.shape[1]), torch.nan)
        for b, rows, keys in parts:
            out[b, rows], lse[b, :, rows] = attended(query[b, rows], key[b, keys], value[b, keys], scale)
        return out, lse

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert p == 0.0
        fmha.used.append(op)
        assert lse.shape == (len(query), query.shape[2], query.shape[1])
        assert lse.is_contiguous()
        grads = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (query, key, value)]
        for b, rows, keys in sequences(query, *_starts(attn_bias)):
            given = grad[b, rows], query[b, rows], key[b, keys], value[b, keys], output[b, rows], lse[b, :, rows]
            grads[0][b, rows], grads[1][b, keys], grads[2][b, keys] = gradients(*given, scale)
        return tuple(grads)

    fmha.memory_efficient_attention_forward_requires_grad = forward
    fmha.memory_efficient_attention_backward = backward
    return {f"xformers{name}": module for name, module in found.items()}


def _starts(mask: BlockDiagonalMask | None) -> tuple[Tensor | None, Tensor | None]:
    if mask is None:
        return None, None
    assert mask.q_seqinfo.max_seqlen >= int(mask.q_seqinfo.seqstart.diff().max())
    return mask.q_seqinfo.seqstart, mask.k_seqinfo.seqstart

"""What else computes attention over a packed batch: each takes (qkv [T,3,H,D], cu_seqlens, layout) and gives [T,H,D].

Every peer gets its best setting: block masks are made once and cached, sequences of equal length share one call.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Lengths = tuple[int, ...]
Peer = Callable[[Tensor, Tensor, Lengths], Tensor]


def sdpa(backend: SDPBackend | None = None) -> Peer:
    """One scaled_dot_product_attention per run of equally long sequences, by one backend or by torch's own choice."""

    def attend(qkv: Tensor, cu_seqlens: Tensor, lengths: Lengths) -> Tensor:
        outs = []
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        for part, (length, sequences) in zip(qkv.split([n * s for n, s in runs]), runs, strict=True):
            q, k, v = part.unflatten(0, (sequences, length)).permute(2, 0, 3, 1, 4)
            if backend is None:
                out = F.scaled_dot_product_attention(q, k, v)
            else:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(q, k, v)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return attend


def varlen(qkv: Tensor, cu_seqlens: Tensor, lengths: Lengths) -> Tensor:
    """torch's own variable-length flash attention (FlashAttention 2, or 3 where it is active)."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(lengths)
    return varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest)


def xformers(qkv: Tensor, cu_seqlens: Tensor, lengths: Lengths) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.unsqueeze(0).unbind(2)
    return memory_efficient_attention(q, k, v, attn_bias=_xformers_bias(lengths)).squeeze(0)


@lru_cache(maxsize=4)
def _xformers_bias(lengths: Lengths) -> object:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(lengths))


def flex(qkv: Tensor, cu_seqlens: Tensor, lengths: Lengths) -> Tensor:
    """FlexAttention, compiled, with a cached mask of blocks; sequences are told apart by their number."""
    q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)
    return _compiled_flex()(q, k, v, block_mask=_block_mask(lengths, str(qkv.device))).squeeze(0).transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=2)
def _block_mask(lengths: Lengths, device: str) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    number = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    total = sum(lengths)
    return create_block_mask(
        lambda b, h, q, k: number[q] == number[k], None, None, total, total, device=device, _compile=True
    )


def eager(qkv: Tensor, cu_seqlens: Tensor, lengths: Lengths) -> Tensor:
    """The formula as it is written, equal lengths in one batch."""
    outs = []
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    for part, (length, sequences) in zip(qkv.split([n * s for n, s in runs]), runs, strict=True):
        q, k, v = part.unflatten(0, (sequences, length)).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        outs.append((scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def peers(device: str) -> dict[str, Peer]:
    """By name, beside the formula; a peer that this machine lacks raises when it is called."""
    found: dict[str, Peer] = {"sdpa": sdpa()}
    if device == "cuda":
        found |= {
            "varlen_attn": varlen,
            "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "sdpa mem-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
            "compiled flex_attention": flex,
            "xformers": xformers,
        }
    return found

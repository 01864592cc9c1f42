"""packed_attention against every other attention installed, at the lengths of ViTs."""

from collections.abc import Iterator
from functools import partial
from itertools import groupby

import torch

import kernels
from benchmarks.kernels.case import Case, Machine
from benchmarks.kernels.peers_of_attention import eager, peers
from kernels.packed_attention import cost

# name: lengths of the sequences of one image, heads, head dim
SHAPES = {
    "37 tokens (local crop)": ((37,), 16, 64),
    "50 tokens (visible quarter)": ((50,), 16, 64),
    "197 tokens (global crop)": ((197,), 16, 64),
    "256 tokens": ((256,), 16, 64),
    "197 tokens, head dim 32 (MAE decoder)": ((197,), 16, 32),
    "257 tokens, head dim 80 (ViT-H/14)": ((257,), 16, 80),
    "2 x 197 + 8 x 37 tokens (multi-crop)": ((197,) * 2 + (37,) * 8, 16, 64),
}


def cases(at: Machine) -> Iterator[Case]:
    for name, (per_image, heads, dim) in SHAPES.items():
        images = max(1, at.tokens // sum(per_image))
        # crops of one size lie together, as the engine packs them
        lengths = tuple(length for length in sorted(per_image, reverse=True) for _ in range(images))
        yield Case(
            "packed_attention",
            name,
            cost(lengths, heads, dim, at.dtype.itemsize),
            partial(_inputs, at, lengths, heads, dim),
            lambda qkv, cu_seqlens, lengths: kernels.packed_attention(qkv, cu_seqlens, max(lengths)),
            eager,
            peers(at.device),
            leaves=(0,),
            part=_some_sequences,
        )


def _some_sequences(inputs: tuple) -> tuple[tuple, torch.Tensor]:
    """The first two and the last two sequences of every run of one length, and their tokens."""
    qkv, cu_seqlens, lengths = inputs
    chosen, place = [], 0
    for _, run in groupby(lengths):
        count = len(list(run))
        chosen += sorted({place, place + 1, place + count - 2, place + count - 1} & set(range(place, place + count)))
        place += count
    starts = cu_seqlens.tolist()
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen]).to(qkv.device)
    kept = tuple(lengths[i] for i in chosen)
    return (qkv[rows], torch.tensor([0, *kept]).cumsum(0).int().to(qkv.device), kept), rows


def _inputs(at: Machine, lengths: tuple[int, ...], heads: int, dim: int) -> tuple:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(at.device)
    return at.randn(sum(lengths), 3, heads, dim), cu_seqlens, lengths

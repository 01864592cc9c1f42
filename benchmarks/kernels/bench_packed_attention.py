"""packed_attention against every other attention installed, at the lengths of ViTs."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

import kernels
from benchmarks.kernels.case import Case, Machine, directions, every_form, machine
from benchmarks.kernels.peers_of_attention import peers
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
        yield from directions(
            "packed_attention",
            name,
            cost(lengths, heads, dim, at.dtype.itemsize),
            partial(_inputs, at, lengths, heads, dim),
            lambda qkv, cu_seqlens, lengths: kernels.packed_attention(qkv, cu_seqlens, max(lengths)),
            peers(at.device),
            leaves=(0,),
        )


def _inputs(at: Machine, lengths: tuple[int, ...], heads: int, dim: int) -> tuple:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(at.device)
    return at.randn(sum(lengths), 3, heads, dim), cu_seqlens, lengths


@pytest.mark.parametrize(("case", "form"), every_form(cases(machine())))
def bench_packed_attention(clock, case, form):
    clock(case, form)

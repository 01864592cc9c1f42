"""packed_attention against one SDPA call per group of equally long sequences, at MAE and DINO shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

# name: (sequences per image and their length), heads, head dim
SHAPES = {
    "MAE-B encoder": ([(1, 50)], 12, 64),
    "MAE decoder": ([(1, 197)], 16, 32),
    "ViT-B": ([(1, 197)], 12, 64),
    "DINO-B crops": ([(2, 197), (8, 37)], 12, 64),
}


def sdpa_per_group(qkv: Tensor, groups: list[tuple[int, int]]) -> Tensor:
    outs = []
    for part, (sequences, length) in zip(qkv.split([s * n for s, n in groups]), groups, strict=True):
        q, k, v = part.unflatten(0, (sequences, length)).permute(2, 0, 3, 1, 4)
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("form", ["ours", "sdpa"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", SHAPES)
def bench_packed_attention(clock, machine, name, backward, form):
    per_image, heads, dim = SHAPES[name]
    groups = [(sequences * machine.batch, length) for sequences, length in per_image]
    lengths = [length for sequences, length in groups for _ in range(sequences)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(machine.device)
    qkv = machine.randn(sum(lengths), 3, heads, dim).requires_grad_(backward)
    function = {
        "ours": lambda x: kernels.packed_attention(x, cu_seqlens, max(lengths)),
        "sdpa": lambda x: sdpa_per_group(x, groups),
    }[form]
    clock(f"{name} {'forward+backward' if backward else 'forward'}", function, qkv)

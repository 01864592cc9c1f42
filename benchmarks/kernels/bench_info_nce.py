"""info_nce against cross-entropy over the stored matrix of similarities, at the shapes of NNCLR and MAE-CT."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels


def cross_entropy(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((queries @ keys.T).float() / 0.15, targets)


@pytest.mark.parametrize("form", ["ours", "plain"])
@pytest.mark.parametrize("ranks", [1, 8])
def bench_info_nce(clock, machine, ranks, form):
    batch = machine.batch * 16
    queries, keys = (F.normalize(machine.randn(n, 256), dim=1).requires_grad_() for n in (batch, batch * ranks))
    targets = torch.arange(batch, device=machine.device)
    function = {
        "ours": lambda q, k: kernels.info_nce(q, k, targets, 0.15),
        "plain": lambda q, k: cross_entropy(q, k, targets),
    }
    clock(f"{batch} queries, {batch * ranks} keys", function[form], queries, keys)

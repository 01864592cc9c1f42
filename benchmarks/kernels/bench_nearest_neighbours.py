"""nearest_neighbours against a top-k of all similarities: NNCLR's queue of 65,536, other views of the image skipped."""

import pytest
import torch
from torch import Tensor

import kernels


def top_k(queries: Tensor, keys: Tensor, k: int, query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    similarity = (queries @ keys.T).float()
    return similarity.masked_fill_(query_ids[:, None] == key_ids, -torch.inf).topk(k, dim=1)


@pytest.mark.parametrize("form", ["ours", "plain"])
@pytest.mark.parametrize("k", [1, 20])
def bench_nearest_neighbours(clock, machine, k, form):
    batch, queue = machine.batch * 16, 65536
    queries, keys = machine.randn(batch, 256), machine.randn(queue, 256)
    ids = torch.randint(0, queue, (batch,), device=machine.device), torch.arange(queue, device=machine.device)
    function = {"ours": kernels.nearest_neighbours, "plain": top_k}[form]
    clock(f"{k} of {queue} keys for {batch} queries", lambda q, x: function(q, x, k, *ids)[0], queries, keys)

"""nearest_neighbours against a top-k of all similarities: NNCLR's queue of 65,536, other views of the image skipped."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, Outputs, wide
from kernels.nearest_neighbours import cost


def top_k(k: int, queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    similarity = wide(queries @ keys.T).masked_fill_(query_ids[:, None] == key_ids, -torch.inf)
    return similarity.max(1, keepdim=True) if k == 1 else similarity.topk(k, dim=1)


def cases(at: Machine) -> Iterator[Case]:
    for k, rows, keys, channels in (
        (1, at.rows, at.keys, 256),
        (20, at.rows, at.keys, 256),
        (20, at.rows, 4 * at.keys, 1024),
    ):
        yield Case(
            "nearest_neighbours",
            f"{k} of {keys} keys, {rows} queries, {channels} wide",
            (cost(rows, keys, channels, at.dtype.itemsize, k),),
            partial(_inputs, at, rows, keys, channels),
            lambda q, x, *ids, k=k: kernels.nearest_neighbours(q, x, k, *ids),
            partial(top_k, k),
            {},
            outputs=_similarities,
        )


def _similarities(found: tuple[Tensor, Tensor], inputs: tuple) -> Outputs:
    """As they were returned, and those which the keys that were found really have: near ties may be told either way."""
    queries, keys, *_ = inputs
    similarity, index = found
    really = (queries[:, None].double() * keys[index].double()).sum(-1)
    return similarity, really.to(similarity.dtype)


def _inputs(at: Machine, rows: int, keys: int, channels: int) -> tuple:
    queries, bank = (F.normalize(at.randn(n, channels), dim=1) for n in (rows, keys))
    return queries, bank, torch.randint(0, keys, (rows,), device=at.device), torch.arange(keys, device=at.device)

"""relation_loss against cross-entropy over the stored map of logits, at the shapes of RelViT: 8 x 8 tokens of small images,
7 x 7 of large ones, and 14 x 14."""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, wide
from kernels.relation import cost


def cross_entropy(queries: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    columns = math.isqrt(places.shape[1])
    logits = torch.einsum("bird,bjrd->brij", queries, keys) * queries.shape[3] ** -0.5
    down, right = ((x[:, :, None] - x[:, None]).sign() for x in (places // columns, places % columns))
    return F.cross_entropy(wide(logits), 3 * down + right + 4)


def cases(at: Machine) -> Iterator[Case]:
    for tokens, channels in ((64, 42), (49, 42), (49, 85), (196, 42)):
        yield Case(
            "relation",
            f"{at.images} images of {tokens} tokens, {channels} channels",
            cost(at.images, tokens, channels, at.dtype.itemsize),
            partial(_inputs, at, tokens, channels),
            lambda q, k, places: kernels.relation_loss(q, k, places, math.isqrt(places.shape[1])),
            cross_entropy,
            {},
            leaves=(0, 1),
        )


def _inputs(at: Machine, tokens: int, channels: int) -> tuple:
    queries, keys = (at.randn(at.images, tokens, 9, channels) for _ in range(2))
    return queries, keys, torch.rand(at.images, tokens, device=at.device).argsort(1)

"""info_nce against cross-entropy over the stored matrix of similarities, at the shapes of NNCLR and MAE-CT."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, wide
from kernels.info_nce import cost

CHANNELS, TEMPERATURE = 256, 0.15


def cross_entropy(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(queries @ keys.T) / TEMPERATURE, targets)


def cases(at: Machine) -> Iterator[Case]:
    for rows, columns in ((at.rows, at.rows), (at.rows, 4 * at.rows), (4 * at.rows, 4 * at.rows)):
        yield Case(
            "info_nce",
            f"{rows} queries, {columns} keys",
            cost(rows, columns, CHANNELS, at.dtype.itemsize),
            partial(_inputs, at, rows, columns),
            lambda q, k, targets: kernels.info_nce(q, k, targets, TEMPERATURE),
            cross_entropy,
            {},
            leaves=(0, 1),
        )


def _inputs(at: Machine, rows: int, columns: int) -> tuple:
    queries, keys = (F.normalize(at.randn(n, CHANNELS), dim=1) for n in (rows, columns))
    return queries, keys, torch.arange(rows, device=at.device)

"""sinkhorn and sinkhorn_cross_entropy against the published loop, for many prototypes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, wide
from kernels.sinkhorn import cost

TEACHER, STUDENT = 0.5, 0.1


def published_sinkhorn(scores: Tensor) -> Tensor:
    q = torch.exp(wide(scores) / TEACHER).T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= samples
    return (q * samples).T


def published_cross_entropy(student: Tensor, scores: Tensor) -> Tensor:
    with torch.no_grad():
        targets = published_sinkhorn(scores)
    return -(targets * F.log_softmax(wide(student) / STUDENT, 1)).sum(1).mean()


def cross_entropy(student: Tensor, scores: Tensor) -> Tensor:
    return kernels.sinkhorn_cross_entropy(scores, student, TEACHER, STUDENT)


def cases(at: Machine) -> Iterator[Case]:
    """On a GPU 2,048 rows of 65,536 prototypes in 16 bit and in fp32 and of 131,072 in 16 bit, as in DINOv2."""
    rows = 2 * at.rows
    for prototypes, dtype in dict.fromkeys(((at.keys, at.dtype), (at.keys, torch.float32), (2 * at.keys, at.dtype))):
        here = replace(at, dtype=dtype)
        name = f"{rows} x {prototypes}, {str(dtype).removeprefix('torch.')}"
        assign, forward, backward = cost(rows, prototypes, dtype.itemsize)
        yield Case(
            "sinkhorn", f"assignment {name}", (assign,), partial(_inputs, here, 1, rows, prototypes),
            lambda scores: kernels.sinkhorn(scores, TEACHER), published_sinkhorn, {},
        )  # fmt: skip
        yield Case(
            "sinkhorn", f"cross-entropy {name}", (forward, backward), partial(_inputs, here, 2, rows, prototypes),
            cross_entropy, published_cross_entropy, {}, leaves=(0,), ends_in=("soft_cross_entropy",),
        )  # fmt: skip


def _inputs(at: Machine, count: int, rows: int, prototypes: int) -> tuple[Tensor, ...]:
    """Student and teacher scores, or teacher scores alone."""
    return tuple(at.randn(rows, prototypes) for _ in range(count))

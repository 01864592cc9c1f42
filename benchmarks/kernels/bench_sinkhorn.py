"""sinkhorn and sinkhorn_cross_entropy against the published loop, for many prototypes."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, directions, every_form, machine, only_forward
from kernels.sinkhorn import cost

TEACHER, STUDENT = 0.5, 0.1


def published_sinkhorn(scores: Tensor) -> Tensor:
    q = torch.exp(scores.float() / TEACHER).T
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
    return -(targets * F.log_softmax(student.float() / STUDENT, 1)).sum(1).mean()


def cases(at: Machine) -> Iterator[Case]:
    """DINOv2's head on a GPU: 2,048 rows of 65,536 prototypes."""
    rows, prototypes = 2 * at.rows, at.keys
    assign, forward, backward = cost(rows, prototypes, at.dtype.itemsize)
    yield only_forward(
        "sinkhorn", f"assignment {rows} x {prototypes}", assign, lambda: (at.randn(rows, prototypes),),
        lambda scores: kernels.sinkhorn(scores, TEACHER),
        {"published": published_sinkhorn, "compiled published": torch.compile(published_sinkhorn, dynamic=False)},
    )  # fmt: skip
    yield from directions(
        "sinkhorn", f"cross-entropy {rows} x {prototypes}", (forward, backward),
        lambda: (at.randn(rows, prototypes), at.randn(rows, prototypes)),
        lambda student, scores: kernels.sinkhorn_cross_entropy(scores, student, TEACHER, STUDENT),
        {"published": published_cross_entropy,
         "compiled published": torch.compile(published_cross_entropy, dynamic=False)}, leaves=(0,),
    )  # fmt: skip


@pytest.mark.parametrize(("case", "form"), every_form(cases(machine())))
def bench_sinkhorn(clock, case, form):
    clock(case, form)

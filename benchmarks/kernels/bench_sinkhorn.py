"""sinkhorn and sinkhorn_cross_entropy against the published loop, for many prototypes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels


def published_sinkhorn(scores: Tensor) -> Tensor:
    q = torch.exp(scores.float() / 0.5).T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= samples
    return (q * samples).T


def published_cross_entropy(scores: Tensor, student: Tensor) -> Tensor:
    return -(published_sinkhorn(scores) * F.log_softmax(student.float() / 0.1, 1)).sum(1).mean()


def shape(machine) -> tuple[int, int]:
    """DINOv2's head on a GPU; a head that a CPU can hold elsewhere."""
    return (2048, 65536) if machine.device == "cuda" else (128, 8192)


@pytest.mark.parametrize("form", ["ours", "published"])
def bench_sinkhorn(clock, machine, form):
    rows, prototypes = shape(machine)
    function = {"ours": lambda x: kernels.sinkhorn(x, 0.5), "published": published_sinkhorn}[form]
    clock(f"assignment {rows} x {prototypes}", function, machine.randn(rows, prototypes))


@pytest.mark.parametrize("form", ["ours", "published"])
def bench_sinkhorn_cross_entropy(clock, machine, form):
    rows, prototypes = shape(machine)
    scores, student = machine.randn(rows, prototypes), machine.randn(rows, prototypes).requires_grad_()
    function = {"ours": lambda x: kernels.sinkhorn_cross_entropy(scores, x, 0.5, 0.1)}.get(
        form, lambda x: published_cross_entropy(scores, x)
    )
    clock(f"cross-entropy {rows} x {prototypes}", function, student)

"""sinkhorn and sinkhorn_cross_entropy against the published loop, for many prototypes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine, directions, every_form, machine, only_forward
from kernels.choice import chosen
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


def cross_entropy(student: Tensor, scores: Tensor) -> Tensor:
    _end_in_its_own_kind(scores.device)
    return kernels.sinkhorn_cross_entropy(scores, student, TEACHER, STUDENT)


@torch.compiler.disable
def _end_in_its_own_kind(device: torch.device) -> None:
    """Sinkhorn's implementations end in the cross-entropy of their name; CUDA C++, which has none, in Triton's."""
    kind = chosen("sinkhorn", device)
    kernels.use("triton" if kind == "cuda" else kind, "soft_cross_entropy")


def cases(at: Machine) -> Iterator[Case]:
    """On a GPU 2,048 rows of 65,536 prototypes in 16 bit and in fp32 and of 131,072 in 16 bit, as in DINOv2."""
    sinkhorn_peers = {
        "published": published_sinkhorn,
        "compiled published": torch.compile(published_sinkhorn, dynamic=False),
    }
    entropy_peers = {
        "published": published_cross_entropy,
        "compiled published": torch.compile(published_cross_entropy, dynamic=False),
    }
    rows = 2 * at.rows
    for prototypes, dtype in dict.fromkeys(((at.keys, at.dtype), (at.keys, torch.float32), (2 * at.keys, at.dtype))):
        here = replace(at, dtype=dtype)
        name = f"{rows} x {prototypes}, {str(dtype).removeprefix('torch.')}"
        assign, forward, backward = cost(rows, prototypes, dtype.itemsize)
        yield only_forward(
            "sinkhorn", f"assignment {name}", assign, partial(_inputs, here, 1, rows, prototypes),
            lambda scores: kernels.sinkhorn(scores, TEACHER), sinkhorn_peers,
        )  # fmt: skip
        yield from directions(
            "sinkhorn", f"cross-entropy {name}", (forward, backward), partial(_inputs, here, 2, rows, prototypes),
            cross_entropy, entropy_peers, leaves=(0,),
        )  # fmt: skip


def _inputs(at: Machine, count: int, rows: int, prototypes: int) -> tuple[Tensor, ...]:
    """Student and teacher scores, or teacher scores alone."""
    return tuple(at.randn(rows, prototypes) for _ in range(count))


@pytest.mark.parametrize(("case", "form"), every_form(cases(machine())))
def bench_sinkhorn(clock, case, form):
    clock(case, form)

"""adamw over the tensors of a ViT (ViT-L on a GPU), alone, and clipped and followed by an average as a teacher does, against a
compiled loop and torch's own steps one after the other."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import kernels
from benchmarks.kernels.case import Case, Machine
from kernels.adamw import cost

LR, BETA1, BETA2, EPS, DECAY, WEIGHT = 1e-3, 0.9, 0.95, 1e-8, 0.05, 0.004
Lists = list[Tensor]


def one_by_one(p: Lists, g: Lists, m: Lists, v: Lists, step: Tensor, averages: Lists, scales: Tensor | None) -> None:
    step += 1
    gradients = g if scales is None else torch._foreach_mul(g, list(scales.unbind()))
    torch._foreach_lerp_(m, gradients, 1 - BETA1)
    torch._foreach_mul_(v, BETA2)
    torch._foreach_addcmul_(v, gradients, gradients, 1 - BETA2)
    root = torch._foreach_sqrt(torch._foreach_div(v, 1 - BETA2**step))
    torch._foreach_add_(root, EPS)
    torch._foreach_mul_(p, 1 - LR * DECAY)
    moved = torch._foreach_div(torch._foreach_div(m, 1 - BETA1**step), root)
    torch._foreach_add_(p, moved, alpha=-LR)
    if averages:
        torch._foreach_lerp_(averages, p, WEIGHT)


def ours(p: Lists, g: Lists, m: Lists, v: Lists, step: Tensor, averages: Lists, scales: Tensor | None) -> None:
    kernels.adamw(
        p, g, m, v, step, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, averages=averages,
        average_weight=WEIGHT, scales=scales,
    )  # fmt: skip


def cases(at: Machine) -> Iterator[Case]:
    width, depth = (1024, 24) if at.device == "cuda" else (64, 2)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = [(width, 3, 16, 16), *(shapes + [(3 * width,), (4 * width,)] + 6 * [(width,)]) * depth]
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    for title, averaged in (("alone", False), ("clipped each, averaged", True)):
        yield Case(
            "adamw",
            f"{len(shapes)} tensors of {elements / 1e6:.1f} M, {title}",
            (cost(elements, averaged),),
            partial(_inputs, at, shapes, averaged),
            ours,
            one_by_one,
            {},
            outputs=lambda _, given: tuple(
                torch.cat([x.flatten() for x in given[i]]) for i in (0, 2, 3, 5) if given[i]
            ),
            in_place=True,
        )


def _inputs(at: Machine, shapes: list[tuple[int, ...]], averaged: bool) -> tuple:
    p, g, m, v, a = ([torch.randn(shape, device=at.device) for shape in shapes] for _ in range(5))
    step = torch.tensor(10.0, device=at.device)
    scales = torch.rand(len(shapes), device=at.device) if averaged else None
    return p, g, m, [x.square_() for x in v], step, a if averaged else [], scales

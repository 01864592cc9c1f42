"""Stochastic depth (Huang et al. 2016) of packed sequences: which sit a branch of a block out, and two forms of computing it.

Weighed, all rows are computed, and each sequence's branch counts 0 or 1 / (1 - rate): one multiplication, which the compiler
fuses into the addition to the residual. Dropped, rows of sequences that sit out are not computed: a fixed number of each length,
so that shapes stay as they are. Rows are gathered where the norm reads them and spread where the residual is added, forward and
backward by reading from where they lie, with no atomic, no zeros and no copy of the residual.

Dropping spares its rate of a branch, and pays for passes over the residual that do not fuse with their neighbours. Of DINO's step
with ViT-L/16 and 64 images, compiled for an H200 and counted without one (docs/speed.md), dropping at a mean rate r over the
blocks moves 413 - 248 r GB where weighing moves 392, and is modelled at 196 - 136 r ms where weighing is at 191: it spares bytes
from a rate of 0.085, time, which products decide, from 0.04 on. On GPUs rows are dropped from where both are spared. On a CPU
products are nearly all of the time.

Shapes: T packed tokens, S sequences, C channels, D blocks, R rows of the sequences that take part, K of these sequences; 2 are
the branches of a block, attention and MLP.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from engine.core.host_memory import to_device
from engine.core.lasting import lasting
from engine.model.tokens import Group, Layout

DROPS_FROM = {"cuda": 0.085, "cpu": 0.03}
"""The rate from which rows are dropped, by kind of device; another than these is taken for a GPU."""


class Weighed(NamedTuple):
    """One block's draw, of which every row is computed.

    worth_2T1, fp32: what each token's branch counts, 0 or 1 / (1 - rate); None where all count 1.
    """

    worth_2T1: Tensor | None


class Dropped(NamedTuple):
    """One block's draw, of which rows are dropped.

    worth_2T1, fp32: as if it were weighed, with sequences / kept of its length in place of 1 / (1 - rate).
    rows_2R, int32: the rows that take part, as `layout` says.
    places_2T, int32: where each token lies among them; of one that sits out, anywhere.
    """

    worth_2T1: Tensor
    rows_2R: Tensor
    places_2T: Tensor
    layout: Layout


def draw(
    layout: Layout, rates: Sequence[float], generator: torch.Generator, device: torch.device
) -> list[Weighed | Dropped]:
    """Who sits out, for blocks of these rates, at random by one draw of a generator on the CPU; on `device`, not waited for.

    A sequence's branch that is weighed sits out with probability `rate`, independently; of those that are dropped, the fixed
    number with the highest noise.
    """
    kept = [kept_of(layout, rate, device) for rate in rates]
    with unset_fake_temporarily():
        noise_D2S = torch.rand(len(rates), 2, layout.sequences, generator=generator).numpy()
        worth_D2S = np.empty_like(noise_D2S)
        firsts, places = [], []
        for rate, stays, noise_2S, worth_2S in zip(rates, kept, noise_D2S, worth_D2S, strict=True):
            if stays is None:
                worth_2S[:] = (noise_2S >= rate) / (1 - rate)
            else:
                worth_2S[:], first_2K, places_2S = _chosen(layout, stays, noise_2S)
                firsts.append(first_2K)
                places.append(places_2S)
        sequence_T, within_T = _rows_of((layout,), device)
        worth_D2T1 = _moved(worth_D2S, device).index_select(2, sequence_T)[..., None]
        dropped = tuple(stays for stays in kept if stays is not None)
        rows, places_E2T = [], []
        if dropped:
            places_E2T = _moved(np.stack(places), device).index_select(2, sequence_T).add_(within_T)
            sequence, within = _rows_of(tuple(stays for stays in dropped for _ in range(2)), device)
            first = _moved(np.concatenate([first_2K.ravel() for first_2K in firsts]), device)
            rows = first.index_select(0, sequence).add_(within).split([2 * stays.tokens for stays in dropped])
    of_dropped = iter(zip(rows, places_E2T, strict=True))
    found: list[Weighed | Dropped] = []
    for worth_2T1, stays in zip(worth_D2T1, kept, strict=True):
        if stays is None:
            found.append(Weighed(worth_2T1))
        else:
            rows_R, places_2T = next(of_dropped)
            found.append(Dropped(worth_2T1, rows_R.view(2, -1), places_2T, stays))
    return found


def _chosen(layout: Layout, stays: Layout, noise_2S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each sequence is worth, fp32 [2, S]; the first row of each that stays, int32 [2, K]; where that row lies among those
    that stay, int32 [2, S]."""
    worth_2S, places_2S = np.zeros_like(noise_2S), np.zeros_like(noise_2S, dtype=np.int32)
    chosen = []
    for members_G, group in zip(_by_length(layout).values(), stays.groups, strict=True):
        order_2G = noise_2S[:, members_G].argsort(axis=1, kind="stable")
        chosen.append(members_G[np.sort(order_2G[:, : group.sequences], axis=1)])
        np.put_along_axis(worth_2S, chosen[-1], np.float32(len(members_G) / group.sequences), axis=1)
    chosen_2K = np.concatenate(chosen, axis=1)
    np.put_along_axis(places_2S, chosen_2K, _starts(stays)[None], axis=1)
    return worth_2S, _starts(layout)[chosen_2K], places_2S


def drops(rate: float, device: torch.device) -> bool:
    """Whether rows are dropped at this rate, where there are sequences enough."""
    return rate > 0 and rate >= DROPS_FROM.get(device.type, DROPS_FROM["cuda"])


def kept_of(layout: Layout, rate: float, device: torch.device) -> Layout | None:
    """What is left of a layout at a rate: sequences of one length are one group, in order of the length's first. None where all
    are weighed: the rate is low, or a length has so few sequences that a whole number is off the rate by over a quarter of it.
    """
    return _kept(layout, rate) if drops(rate, device) else None


@lru_cache(maxsize=256)
def _kept(layout: Layout, rate: float) -> Layout | None:
    counts = {length: len(members) for length, members in _by_length(layout).items()}
    stays = {length: max(1, round(count * (1 - rate))) for length, count in counts.items()}
    if any(abs(1 - stays[length] / count - rate) > rate / 4 for length, count in counts.items()):
        return None
    return Layout(tuple(Group(stays[length], length) for length in counts), layout.passing)


def take(x_TC: Tensor, rows_R: Tensor, places_T: Tensor, worth_T1: Tensor) -> Tensor:
    """The rows [R, C] that take part in a branch."""
    return _Take.apply(x_TC, rows_R, places_T, worth_T1)


def put(x_TC: Tensor, change_RC: Tensor, rows_R: Tensor, places_T: Tensor, worth_T1: Tensor) -> Tensor:
    """The residual with the branch of those rows added, each by its worth: [T, C] of x_TC's dtype."""
    return _Put.apply(x_TC, change_RC, rows_R, places_T, worth_T1)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TC, rows_R, places_T, worth_T1):
        ctx.save_for_backward(places_T, worth_T1)
        return x_TC.index_select(0, rows_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RC):
        places_T, worth_T1 = ctx.saved_tensors
        return torch.where(worth_T1 > 0, grad_RC.index_select(0, places_T), 0), None, None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TC, change_RC, rows_R, places_T, worth_T1):
        ctx.save_for_backward(rows_R, worth_T1)
        ctx.dtype = change_RC.dtype
        # not the sum's format is changed: of a result that `to` gives back as it is, dynamo loses the gradient
        return x_TC + (change_RC.index_select(0, places_T) * worth_T1).to(x_TC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TC):
        rows_R, worth_T1 = ctx.saved_tensors
        grad_RC = grad_TC.index_select(0, rows_R) * worth_T1.index_select(0, rows_R)
        return grad_TC, grad_RC.to(ctx.dtype), None, None, None


@lru_cache(maxsize=256)
def _by_length(layout: Layout) -> dict[int, np.ndarray]:
    """The sequences of each length, in order."""
    lengths_S = np.repeat([g.length for g in layout.groups], [g.sequences for g in layout.groups])
    return {length: np.flatnonzero(lengths_S == length) for length in dict.fromkeys(lengths_S.tolist())}


@lru_cache(maxsize=256)
def _starts(layout: Layout) -> np.ndarray:
    """The first row of each sequence, int32 [S]."""
    lengths_S = np.repeat([g.length for g in layout.groups], [g.sequences for g in layout.groups])
    return (np.cumsum(lengths_S) - lengths_S).astype(np.int32)


@lru_cache(maxsize=16)
def _rows_of(layouts: tuple[Layout, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For the rows of layouts one after another: the sequence of each, counted through, and its place in that; int32."""
    groups = [group for layout in layouts for group in layout.groups]
    lengths_S = np.repeat([g.length for g in groups], [g.sequences for g in groups])
    starts_S = np.cumsum(lengths_S) - lengths_S
    within = np.arange(lengths_S.sum()) - np.repeat(starts_S, lengths_S)
    both = np.stack([np.repeat(np.arange(len(lengths_S)), lengths_S), within]).astype(np.int32)
    with lasting():
        sequence, within = torch.from_numpy(both).to(device)
    return sequence, within


def _moved(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device, which is not waited for."""
    return to_device(torch.from_numpy(values), device)

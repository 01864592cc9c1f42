"""Which phase of fewer tokens comes next, by the error of its gradients: `--tokens auto`.

After arXiv 2410.22364 ("Accelerating Augmentation Invariance Pretraining"), whose code and table were not found; the estimator is
ours. Where a stretch begins, each candidate, and whole images, give the gradients g of the same few batches, by the weights as
they are. Of a candidate c beside whole images w

    bias      = |E g_c - E g_w|^2
    variance  = E |g_c - E g_c|^2, of one batch
    error     = bias + variance * cost

where cost is the operations of an image in c over those in w: for the compute of a batch of whole images a candidate could have
1 / cost as many, of so much less variance. Norms are over all parameters together, of gradients as they are, before clipping and
optimiser. The candidate of the least error is taken, of equal ones the cheapest; whole images are one of them, without bias.

Batches come in pairs (1, 2) of other images, so that both terms are estimated without bias of their own, and no gradient is kept
longer than its pair is looked at:

    bias      ~ <g_c1 - g_w1, g_c2 - g_w2>        variance  ~ |g_c1 - g_c2|^2 / 2

means over `PAIRS`; a bias below 0 is taken for 0. It takes memory for four gradients, and nothing of the run changes: every pass
ends as an update that is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core import dist
from engine.core.draws import Draws
from engine.core.host_memory import to_device
from engine.core.phases import WHOLE, Phase
from engine.data.batch import Batch
from engine.methods.base import Method
from engine.model.vit import VisionTransformer
from engine.training.drawing import drawn
from engine.training.fewer_tokens import obstacle
from engine.training.optimizers import drop_frozen
from engine.training.step import Update

CANDIDATES = (
    *(Phase(0.5), Phase(5 / 7), Phase(patch=2.0), Phase(patch=2.0, keep=0.5)),
    *(Phase(keep=0.25), Phase(keep=0.5), Phase(keep=0.75)),
)
PAIRS = 4

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Measured:
    """Of a phase: squared bias and variance of its gradients, and what an image costs, whole ones 1."""

    phase: Phase
    bias: float
    variance: float
    cost: float

    @property
    def error(self) -> float:
        return self.bias + self.variance * self.cost


def candidates(kind: type[Method], encoder: VisionTransformer) -> tuple[Phase, ...]:
    """The phases of fewer tokens that a method can show this encoder."""
    return tuple(phase for phase in CANDIDATES if not obstacle(kind, phase, encoder))


def in_words(phase: Phase) -> str:
    """What is seen of images, for a line of a log."""
    words = [f"{phase.side:.3g} of the side"] * (phase.side < 1)
    words += [f"patches of {phase.patch:.3g} times the side"] * (phase.patch > 1)
    return " and ".join(words + [f"{phase.keep:.3g} of the patches"] * (phase.keep < 1)) or "all"


def best(table: Sequence[Measured]) -> Phase:
    """Of the least error, of equal ones the cheapest; whole images where no error is finite."""
    finite = [one for one in table if math.isfinite(one.error)]
    return min(finite, key=lambda one: (one.error, one.cost)).phase if finite else WHOLE


def measured(
    update: Update,
    step: int,
    phases: Sequence[Phase],
    batches: Callable[[], Iterator[Batch]],
    draws: Callable[[int], Draws],
) -> list[Measured]:
    """Of each of these phases, of which `WHOLE` is one, and the same on all ranks.

    Args:
        update: of the stage; it and its method are left as they are.
        step: where the stage is.
        batches: this rank's rows of batches 0, 1, ..., the same images at each call, by the views of the method's phase.
        draws: of so manieth a batch.
    """
    own, streams = update.method.phase, {}
    sums, costs, views = {phase: [0.0, 0.0] for phase in phases}, {}, {}
    for phase in phases:
        update.method.phase = phase
        costs[phase], views[phase] = update.method.flops_per_image(), update.method.views()
        if views[phase] not in streams:
            streams[views[phase]] = batches()
    for pair in range(PAIRS):
        given = {crops: (next(stream), next(stream)) for crops, stream in streams.items()}
        whole = _of_pair(update, step, WHOLE, given[views[WHOLE]], draws, pair)
        for phase, found in sums.items():
            these = whole if phase == WHOLE else _of_pair(update, step, phase, given[views[phase]], draws, pair)
            found[0] += _inner(_less(these[0], whole[0]), _less(these[1], whole[1]))
            off = _less(*these)
            found[1] += _inner(off, off) / 2
    update.method.phase = own
    return [
        Measured(phase, max(0.0, bias / PAIRS), variance / PAIRS, costs[phase] / costs[WHOLE])
        for phase, (bias, variance) in sums.items()
    ]


def _of_pair(
    update: Update, step: int, phase: Phase, batches: Sequence[Batch], draws: Callable[[int], Draws], pair: int
) -> list[Gradients]:
    update.method.phase = phase
    return [_gradients(update, step, batch, draws(2 * pair + number)) for number, batch in enumerate(batches)]


def _gradients(update: Update, step: int, batch: Batch, draws: Draws) -> Gradients:
    """Of all that is trained, the mean over ranks; then as after an update that was left out."""
    method, device = update.method, update.skipped.device
    moment = update.moment(step)
    method.begin(moment)
    # uncompiled: each phase has other shapes, of which one is taken
    with torch.compiler.set_stance("force_eager"):
        update.gradients(batch.images, to_device(batch.ids, device), drawn(method, draws) | batch.shapes)
    drop_frozen(update.optimizer, moment.epoch)
    scale = 1.0 if update.loss_scale is None else update.loss_scale.scale
    found = [None if p.grad is None else p.grad.float() / scale for p in update.trained]
    update.optimizer.zero_grad(set_to_none=True)
    method.after_step(torch.zeros((), dtype=torch.bool, device=device))
    return found


def _less(one: Gradients, other: Gradients) -> Gradients:
    """The difference; what has no gradient counts as 0."""
    pairs = zip(one, other, strict=True)
    return [a if b is None else -b if a is None else a - b for a, b in pairs]


def _inner(one: Gradients, other: Gradients) -> float:
    products = [(a * b).sum() for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return float(torch.stack(products).double().sum())


def agreed(phase: Phase, phases: Sequence[Phase]) -> Phase:
    """The first rank's, of these."""
    return phases[dist.share(phases.index(phase))]

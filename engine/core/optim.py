"""Parameter groups, averages of weights, schedules: what a method says of its optimisation. A schedule is a function of the step
and has no state."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

CLIP_OVER = ("all", "part", "tensor")
OPTIMIZERS = ("adamw", "larc")
SCHEDULES = ("cosine", "quarter-cosine", "late-quarter-cosine", "steps")
WARMUPS = {"from-start": (0, 0), "to-peak": (1, 0), "through": (0, -1), "between": (1, 1), "late": (0, 0)}
"""By the ends that are among the W steps of a warm-up: (a, b) where step s has the share (s + a) / (W + b)."""


@dataclass(frozen=True)
class Moment:
    """Where in its stage an update lies: all that a schedule depends on; and whether someone will look.

    Attributes:
        step: what the stage's clock shows: the updates before this one, but where phases differ in their images, or the clock
            goes by compute (`engine.core.timetable`).
        total_steps: where schedules end on it; past the stage's own end where its horizon is above 1.
        steps_per_epoch: of the data.
        logged: whether what the update reports will be read. Nothing that is trained or kept may depend on it.
        seen: images of the stage before this update.
        growth: how many times the settings' batch this update's is. What follows trained weights keeps this power of the share
            that it keeps at one batch (Busbridge et al., "How to Scale Your EMA", arXiv 2307.13813).
    """

    step: float = 0
    total_steps: int = 1
    steps_per_epoch: int = 1
    logged: bool = True
    seen: int = 0
    growth: float = 1.0

    @property
    def epoch(self) -> int:
        return int(self.step // self.steps_per_epoch)


@dataclass(frozen=True)
class Group:
    """Named parameters that share a peak learning rate and a weight decay.

    Attributes:
        frozen_epochs: for so long their gradients are dropped, so that nothing of the optimiser touches them;
        watches: or, instead, the learning rate is 0, so that the optimiser's moments know of these gradients.
        clips: whether they take part in the clipping of gradients.
    """

    parameters: dict[str, nn.Parameter]
    peak_lr: float
    weight_decay: float
    frozen_epochs: int = 0
    watches: bool = False
    clips: bool = True


@dataclass(frozen=True)
class Average:
    """Tensors that follow trained ones at each update: average += weight * (online - average).

    Attributes:
        pairs: average and online, of one shape each.
        weight: from 0 to 1, of this update.
    """

    pairs: list[tuple[Tensor, nn.Parameter]]
    weight: float


def warmup_cosine(
    step: int, total_steps: int, warmup_steps: float, start: float = 0.0, end: float = 0.0, ahead: int = 0
) -> float:
    """Share of the peak lr at a step: linear from the share `start` over the warm-up, then half a cosine to the share `end`
    (per step, not per epoch).

    Args:
        ahead: steps by which the warm-up has begun before the first; 1 where a first step at a rate of 0 would be none.
    """
    if step < warmup_steps:
        return start + (1 - start) * ((step + ahead) / (warmup_steps + ahead))
    return cosine(step - warmup_steps, total_steps - warmup_steps, 1.0, end)


def share_of_peak(
    schedule: str,
    step: float,
    total_steps: int,
    warmup_steps: int,
    start: float = 0.0,
    end: float = 0.0,
    drops: Sequence[float] = (),
    warmup: str = "from-start",
) -> float:
    """Share of the peak lr at a step: linear from the share `start` over the warm-up, whose form is one of `WARMUPS` (late: all
    of it one step later than from-start, since the rate is set after an update, SimMIM), then

    cosine: half a cosine to the share `end`; to-peak is a step ahead of the others (MSN), between reaches `end` with the last
        step (MAE-CT, MIM-Refiner), where others would one step later (MAE, DINO);
    quarter-cosine: the falling quarter of a cosine to `end` that spans all steps, those of the warm-up too (RelViT's code);
    late-quarter-cosine: one that begins with the warm-up's end, but not below `end`;
    steps: the peak, a tenth of it from each of `drops`, shares of `total_steps`, on; but not below `end` (SimMIM).
    """
    step = max(0, step - 1) if warmup == "late" else step
    ahead, more = WARMUPS[warmup]
    if step < warmup_steps:
        # no more than all of it, where a clock stands between its last step and its end
        return start + (1 - start) * min(1.0, (step + ahead) / max(1, warmup_steps + more))
    if schedule == "cosine":
        ahead, fewer = int(warmup == "to-peak"), int(warmup == "between")
        step = min(step + ahead, total_steps - fewer)
        return cosine(step - warmup_steps, total_steps - warmup_steps - fewer, 1.0, end)
    if schedule == "quarter-cosine":
        return end + (1 - end) * math.cos(0.5 * math.pi * step / max(1, total_steps))
    if schedule == "late-quarter-cosine":
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return max(end, math.cos(0.5 * math.pi * done))
    return max(end, 0.1 ** sum(step >= round(drop * total_steps) for drop in drops))


def cosine(step: float, total_steps: float, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last."""
    return end + (start - end) * (0.5 * (1 + math.cos(math.pi * step / max(1, total_steps))))


def linear(step: int, total_steps: int, start: float, end: float) -> float:
    """A straight line from `start` at step 0 to `end` at the last."""
    return start + (end - start) * step / max(1, total_steps)


def ramp(index: int, count: int, start: float, end: float) -> float:
    """The first `count` of an endless row of values rise evenly from `start` to `end`, both included; all others are `end`."""
    return start + (end - start) * index / (count - 1) if index < count - 1 else end


def scaled_lr(base_lr: float, images: int) -> float:
    """The linear scaling rule: base_lr is meant for 256 images (Goyal et al. 2017, as used by MAE)."""
    return base_lr * images / 256


def root_scaled_lr(base_lr: float, images: int) -> float:
    """The square-root rule: base_lr is meant for 1024 images (DINOv2)."""
    return base_lr * math.sqrt(images / 1024)


def with_decay(
    named: Iterable[tuple[str, nn.Parameter]], peak_lr: float, weight_decay: float, **others: object
) -> Iterator[Group]:
    """Split into what decays and what doesn't: one-dimensional parameters (biases, norms). As in MAE, [1, 1, C] tokens decay.

    `others` are further fields of `Group`, the same for both.
    """
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    for decays in (True, False):
        members = {n: p for n, p in named if (p.ndim > 1) == decays}
        if members:
            yield Group(members, peak_lr, weight_decay if decays else 0.0, **others)


def decays_as_listed(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter decays where vectors, positions and prefix tokens do not."""
    return not (parameter.ndim == 1 or name.endswith(("pos_embed", "_token")))


def by_layer(
    named: Iterable[tuple[str, nn.Parameter]],
    height: Callable[[str], int],
    top: int,
    peak_lr: float,
    weight_decay: float,
    layer_decay: float,
    decays: Callable[[str, nn.Parameter], bool] = lambda name, parameter: parameter.ndim > 1,
) -> Iterator[Group]:
    """Groups whose rate is peak_lr * layer_decay ** (top - height(name)), each split into what decays and what doesn't."""
    members: dict[tuple[int, bool], dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in named:
        if parameter.requires_grad:
            members[height(name), decays(name, parameter)][name] = parameter
    for (layer, decaying), group in sorted(members.items()):
        yield Group(group, peak_lr * layer_decay ** (top - layer), weight_decay if decaying else 0.0)

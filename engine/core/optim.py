"""Parameter groups, schedules, optimisers, clipping. A schedule is a function of the step and has no state."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLIP_OVER = ("all", "part", "tensor")
OPTIMIZERS = ("adamw", "larc")
SCHEDULES = ("cosine", "quarter-cosine", "steps")


@dataclass(frozen=True)
class Moment:
    """Where in its stage an update lies: all that a schedule depends on.

    Attributes:
        step: updates of the stage before this one.
        total_steps: where schedules end; past the stage's own end where its horizon is above 1.
        steps_per_epoch: of the data.
    """

    step: int = 0
    total_steps: int = 1
    steps_per_epoch: int = 1

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch


@dataclass(frozen=True)
class Group:
    """Named parameters that share a peak learning rate and a weight decay.

    Attributes:
        frozen_epochs: for so long their gradients are dropped, so that nothing of the optimiser touches them.
        clips: whether they take part in the clipping of gradients.
    """

    parameters: dict[str, nn.Parameter]
    peak_lr: float
    weight_decay: float
    frozen_epochs: int = 0
    clips: bool = True


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
    step: int,
    total_steps: int,
    warmup_steps: int,
    start: float = 0.0,
    end: float = 0.0,
    drops: Sequence[float] = (),
) -> float:
    """Share of the peak lr at a step: linear from the share `start` over the warm-up, then

    cosine: half a cosine to the share `end` (MAE);
    quarter-cosine: the falling quarter of a cosine, but not below `end` (RelViT);
    steps: the peak, a tenth of it from each of `drops`, shares of `total_steps`, on; but not below `end` (SimMIM).
    """
    if schedule == "cosine" or step < warmup_steps:
        return warmup_cosine(step, total_steps, warmup_steps, start, end)
    if schedule == "quarter-cosine":
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


def adamw(groups: Iterable[Group], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW, on CPU and GPU: the one that can skip an update by a device flag (`found_inf`) without a host sync."""
    return torch.optim.AdamW(_described(groups), betas=betas, fused=True)


class Larc(torch.optim.SGD):
    """SGD with momentum in which each tensor's step is in proportion to its own norm (You et al., "Large Batch Training of
    Convolutional Networks", 2017, algorithm 1 without clipping, as SwAV uses it). Skips an update by `found_inf`, too.

    The gradient, with weight decay, is scaled by trust * |parameter| / (|gradient| + decay * |parameter|); tensors or gradients
    of zeros are not scaled.
    """

    def __init__(self, groups: Iterable[Group], momentum: float, trust: float = 1e-3):
        super().__init__(_described(groups), lr=0.0, momentum=momentum, fused=True)
        self.trust = trust
        # The fused kernel allocates momenta at its first step and, if that one is skipped, leaves them unwritten.
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            self._scale([p for p in group["params"] if p.grad is not None], group["weight_decay"])
            group["weight_decay"] = 0.0  # it is in the gradients now
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    def _scale(self, parameters: list[nn.Parameter], decay: float) -> None:
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        sizes, slopes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, gradients))
        factors = self.trust * sizes / (slopes + decay * sizes)
        torch._foreach_add_(gradients, parameters, alpha=decay)
        torch._foreach_mul_(gradients, list(torch.where((sizes > 0) & (slopes > 0), factors, 1.0).unbind()))


def _described(groups: Iterable[Group]) -> list[dict]:
    """Groups as torch's optimisers take them."""
    return [
        {
            "params": list(group.parameters.values()),
            "names": list(group.parameters),
            "peak_lr": group.peak_lr,
            "lr": 0.0,
            "weight_decay": group.weight_decay,
            "first_decay": group.weight_decay,
            "frozen_epochs": group.frozen_epochs,
            "clips": group.clips,
        }
        for group in groups
    ]


def set_lr(optimizer: torch.optim.Optimizer, share_of_peak: float) -> float:
    """Set every group's lr to its share of its own peak; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share_of_peak
    return max(group["lr"] for group in optimizer.param_groups)


def set_decay(optimizer: torch.optim.Optimizer, share_of_first: float) -> None:
    """Set every group's weight decay to its share of what it began with."""
    for group in optimizer.param_groups:
        group["weight_decay"] = group["first_decay"] * share_of_first


def drop_frozen(optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Forget the gradients of groups that are frozen in this epoch: neither step, decay nor moments then touch them."""
    for group in optimizer.param_groups:
        if epoch < group["frozen_epochs"]:
            for parameter in group["params"]:
                parameter.grad = None


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float, over: str) -> None:
    """Scale gradients down so that no norm exceeds `largest`, without a host sync.

    Args:
        over: what a norm is taken over: "all" gradients, each "part" of the method (the encoder, each head), or each "tensor"
            by itself.
    """
    members: dict[str, list[nn.Parameter]] = defaultdict(list)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            if group["clips"] and parameter.grad is not None:
                members[name.partition(".")[0] if over == "part" else ""].append(parameter)
    for parameters in members.values():
        gradients = [parameter.grad for parameter in parameters]
        if over == "tensor":
            factors = largest / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)
            torch._foreach_mul_(gradients, list(factors.clamp(max=1.0).unbind()))
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, torch.nn.utils.get_total_norm(gradients))


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state by parameter name: `NAME/exp_avg` and so on."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"])
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`; state of parameters that have none in `tensors` is dropped."""
    by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        by_name[name][field] = value
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            if name in by_name:
                state = {key: value.to(parameter.device, copy=True) for key, value in by_name[name].items()}
                optimizer.state[parameter] = state


@torch.no_grad()
def move_average(average: list[Tensor], online: list[Tensor], weight: Tensor) -> None:
    """average += weight * (online - average), in place; `weight` is a scalar on the device, 0 leaves the average bit for bit."""
    step = torch._foreach_sub(online, average)
    torch._foreach_mul_(step, weight)
    torch._foreach_add_(average, step)

"""Parameter groups and schedules. A schedule is a function of the step and has no state."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """Named parameters that share a peak learning rate and a weight decay."""

    parameters: dict[str, nn.Parameter]
    peak_lr: float
    weight_decay: float


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak lr at a step: linear from 0 over the warm-up, then half a cosine to 0 (per step, not per epoch)."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def scaled_lr(base_lr: float, images: int) -> float:
    """The linear scaling rule: base_lr is meant for 256 images (Goyal et al. 2017, as used by MAE)."""
    return base_lr * images / 256


def with_decay(named: Iterable[tuple[str, nn.Parameter]], peak_lr: float, weight_decay: float) -> Iterator[Group]:
    """Split into what decays and what doesn't: one-dimensional parameters (biases, norms). As in MAE, [1, 1, C] tokens decay."""
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    for decays in (True, False):
        members = {n: p for n, p in named if (p.ndim > 1) == decays}
        if members:
            yield Group(members, peak_lr, weight_decay if decays else 0.0)


def adamw(groups: Iterable[Group], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW, on CPU and GPU: the one that can skip an update by a device flag (`found_inf`) without a host sync."""
    return torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()),
                "names": list(group.parameters),
                "peak_lr": group.peak_lr,
                "lr": 0.0,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=betas,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, share_of_peak: float) -> float:
    """Set every group's lr to its share of its own peak; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share_of_peak
    return max(group["lr"] for group in optimizer.param_groups)


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

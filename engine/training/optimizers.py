"""Optimisers, what is done to gradients before them, and their state by parameter name. Nothing here waits for the device."""

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from engine.core.optim import Average, Group
from kernels.adamw.reference import move_averages

# what each gradient is multiplied by before the step; the same scalar for many, or one of its own
Scales = Mapping[nn.Parameter, Tensor]


class _Members(NamedTuple):
    """Parameters that one call updates."""

    parameters: list[nn.Parameter]
    step: Tensor
    averages: list[Tensor]
    weight: float


class AdamW(torch.optim.Optimizer):
    """AdamW that clips, skips and moves averages in its one pass over the weights: `kernels.adamw`.

    State by parameter: exp_avg, exp_avg_sq, and the step, which those of a group share that began together.
    """

    def __init__(self, groups: Iterable[Group], betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(_described(groups), {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(
        self, applied: Tensor | None = None, scales: Scales | None = None, averages: Sequence[Average] = ()
    ) -> None:
        """Update by the gradients that are there.

        Args:
            applied: bool [] on the device; where false, nothing changes.
            scales: of gradients; those of parameters that are not in it stay as they are.
            averages: move after the weights. Of several that follow one weight, the first moves in the same pass.
        """
        scales = scales or {}
        followed, others = _shared_out(averages)
        for group in self.param_groups:
            for members in self._members(group, scales, followed):
                kernels.adamw(
                    members.parameters, [p.grad for p in members.parameters],
                    *([self.state[p][name] for p in members.parameters] for name in ("exp_avg", "exp_avg_sq")),
                    members.step, lr=group["lr"], betas=group["betas"], eps=group["eps"],
                    weight_decay=group["weight_decay"], averages=members.averages, average_weight=members.weight,
                    scales=_in_order(members.parameters, scales), applied=applied,
                )  # fmt: skip
        # after all calls, since those of several may share a count
        steps = {id(state["step"]): state["step"] for p, state in self.state.items() if p.grad is not None}
        for step in steps.values():  # a few; torch._foreach_add_ would read the flag on the host
            step += 1 if applied is None else applied
        move(others, applied)

    def _members(
        self, group: dict, scales: Scales, followed: Mapping[nn.Parameter, tuple[Tensor, float]]
    ) -> Iterator["_Members"]:
        """The group's parameters that have gradients, by what they share."""
        present = [parameter for parameter in group["params"] if parameter.grad is not None]
        new = [parameter for parameter in present if parameter not in self.state]
        if new:
            first = torch.zeros((), device=new[0].device)
            for p in new:
                self.state[p] = {"step": first, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self._part_from_absent(group["params"])
        shared: dict[tuple, list[nn.Parameter]] = defaultdict(list)
        for parameter in present:
            _, weight = followed.get(parameter, (None, None))
            shared[id(self.state[parameter]["step"]), weight, parameter in scales].append(parameter)
        for parameters in shared.values():
            averages = [followed[parameter][0] for parameter in parameters if parameter in followed]
            weight = followed[parameters[0]][1] if averages else 0.0
            yield _Members(parameters, self.state[parameters[0]]["step"], averages, weight)

    def _part_from_absent(self, parameters: list[nn.Parameter]) -> None:
        """Who shares its count of steps with one that has no gradient now counts by itself from here on."""
        absent = {id(self.state[p]["step"]) for p in parameters if p.grad is None and p in self.state}
        own: dict[int, Tensor] = {}
        for parameter in parameters:
            if parameter.grad is not None and id(self.state[parameter]["step"]) in absent:
                step = self.state[parameter]["step"]
                self.state[parameter]["step"] = own.setdefault(id(step), step.clone())


class Larc(torch.optim.SGD):
    """SGD with momentum in which each tensor's step is in proportion to its own norm (You et al., "Large Batch Training of
    Convolutional Networks", 2017, algorithm 1 without clipping, as SwAV uses it).

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
    def step(
        self, applied: Tensor | None = None, scales: Scales | None = None, averages: Sequence[Average] = ()
    ) -> None:
        """As of `AdamW`."""
        if scales:
            torch._foreach_mul_([parameter.grad for parameter in scales], list(scales.values()))
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            self._scale([p for p in group["params"] if p.grad is not None], group["weight_decay"])
            group["weight_decay"] = 0.0  # it is in the gradients now
        # the fused kernel reads this flag on the device and leaves weights and momenta alone when it is 1
        self.found_inf = None if applied is None else (~applied).to(torch.float32)
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        move(averages, applied)

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
            "watches": group.watches,
            "clips": group.clips,
        }
        for group in groups
    ]


def set_lr(optimizer: torch.optim.Optimizer, share_of_peak: float, epoch: int = 0) -> float:
    """Set every group's lr to its share of its own peak, or to 0 where it only watches in this epoch; returns the largest."""
    for group in optimizer.param_groups:
        waits = group["watches"] and epoch < group["frozen_epochs"]
        group["lr"] = 0.0 if waits else group["peak_lr"] * share_of_peak
    return max(group["lr"] for group in optimizer.param_groups)


def set_decay(optimizer: torch.optim.Optimizer, share_of_first: float) -> None:
    """Set every group's weight decay to its share of what it began with."""
    for group in optimizer.param_groups:
        group["weight_decay"] = group["first_decay"] * share_of_first


def drop_frozen(optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Forget the gradients of groups that are frozen in this epoch and don't watch: neither step, decay nor moments then touch
    them."""
    for group in optimizer.param_groups:
        if epoch < group["frozen_epochs"] and not group["watches"]:
            for parameter in group["params"]:
                parameter.grad = None


class Norms(NamedTuple):
    """L2 norms of the gradients that are there.

    values: [n], on the device, without any scaling of the loss.
    """

    parameters: list[nn.Parameter]
    values: Tensor

    def total(self) -> Tensor:
        """Of all gradients together."""
        return torch.linalg.vector_norm(self.values)

    def among(self, parameters: list[nn.Parameter]) -> Tensor:
        """Those of some parameters, in their order."""
        if len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters)):
            return self.values
        own = dict(zip(self.parameters, self.values.unbind()))
        return torch.stack([own[parameter] for parameter in parameters])


def gradient_norms(optimizer: torch.optim.Optimizer, unscale: Tensor | None = None) -> Norms:
    """Of gradients that are `unscale` times as large without a scaling of the loss."""
    present = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    values = torch.stack(torch._foreach_norm([parameter.grad for parameter in present]))
    return Norms(present, values if unscale is None else values * unscale)


def gradient_scales(
    optimizer: torch.optim.Optimizer, norms: Norms, largest: float, over: str, unscale: Tensor | None = None
) -> dict[nn.Parameter, Tensor]:
    """What clips gradients, so that no norm exceeds `largest`, and takes a scaling of the loss back.

    Args:
        largest: 0 does not clip.
        over: what a norm is taken over: "all" gradients, each "part" of the method (the encoder, each head), or each "tensor"
            by itself.
        unscale: undoes the scaling; None where there is none.
    """
    scales = {} if unscale is None else dict.fromkeys(norms.parameters, unscale)
    if not largest:
        return scales
    members: dict[str, list[nn.Parameter]] = defaultdict(list)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            if group["clips"] and parameter.grad is not None:
                members[name.partition(".")[0] if over == "part" else ""].append(parameter)
    for parameters in members.values():
        own = norms.among(parameters)
        factors = (largest / ((own if over == "tensor" else torch.linalg.vector_norm(own)) + 1e-6)).clamp(max=1.0)
        factors = factors if unscale is None else factors * unscale
        scales |= zip(parameters, factors.unbind() if over == "tensor" else [factors] * len(parameters))
    return scales


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
        steps: dict[float, Tensor] = {}
        for name, parameter in zip(group["names"], group["params"]):
            if name in by_name:
                state = {key: value.to(parameter.device, copy=True) for key, value in by_name[name].items()}
                if "step" in state:  # shared by those who made as many
                    state["step"] = steps.setdefault(float(by_name[name]["step"]), state["step"])
                optimizer.state[parameter] = state


@torch.no_grad()
def move(averages: Iterable[Average], applied: Tensor | None) -> None:
    """Move averages by themselves; nothing where `applied`, bool [] on the device, is false."""
    for average in averages:
        if average.pairs:
            move_averages(*map(list, zip(*average.pairs)), average.weight, applied)


def _shared_out(
    averages: Sequence[Average],
) -> tuple[dict[nn.Parameter, tuple[Tensor, float]], list[Average]]:
    """By parameter that has a gradient the first average that follows it, and its weight; and what is left."""
    followed: dict[nn.Parameter, tuple[Tensor, float]] = {}
    others = []
    for average in averages:
        left = []
        for tensor, parameter in average.pairs:
            if parameter.grad is None or parameter in followed:
                left.append((tensor, parameter))
            else:
                followed[parameter] = tensor, average.weight
        others.append(Average(left, average.weight))
    return followed, others


def _in_order(parameters: list[nn.Parameter], scales: Scales) -> Tensor | None:
    """The scales of these parameters, of which all or none have one: one for all where they share it."""
    if parameters[0] not in scales:
        return None
    own = [scales[parameter] for parameter in parameters]
    return own[0] if len(set(map(id, own))) == 1 else torch.stack(own)

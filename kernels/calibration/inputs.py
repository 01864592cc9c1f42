"""Tensors for a call: random numbers in the call's own dtypes and sizes, and what an op's folder says of its own arguments.

An op's `kernels/OP/inputs.py` may have
    fill(name, value, arguments): a better value for the argument of that name (indices in range, rows of length 1)
    DIFFERENTIABLE: by call, the arguments whose gradients belong to it
    slices(arguments, pick): parts of the call that can be computed by themselves, where the whole in float64 is too large
    comparable(outputs, arguments): what of the outputs to compare, where an output is an index
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kernels.calibration.calls import Call, restored
from kernels.choice import AVAILABLE, CALLS

SEED = 20_261


def of_op(op: str) -> object:
    """The op's own words on its arguments."""
    return importlib.import_module(f"kernels.{op}.inputs")


def make(call: Call, device: torch.device | str) -> dict[str, Any]:
    """The call's arguments by name, the same each time. What forward hands to backward comes from the reference."""
    torch.manual_seed(SEED)
    arguments = {name: _drawn(value, device) for name, value in call.arguments.items()}
    fill = getattr(of_op(call.op), "fill", None)
    if fill is not None:
        arguments = {name: fill(name, value, arguments) for name, value in arguments.items()}
    forward = call.name.replace("_backward", "_forward")
    if forward != call.name:
        needed = _names(forward)
        outputs = getattr(torch.ops.tessera, forward)(*(arguments[name] for name in needed), "reference")
        saved = [name for name in arguments if name not in needed and not name.startswith("grad_")]
        arguments |= dict(zip(saved, outputs[-len(saved) :], strict=True))
    return arguments


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, dict(arguments))


def changed(call: str) -> list[str]:
    """The arguments that the op writes to."""
    arguments = getattr(torch.ops.tessera, call).default._schema.arguments
    return [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]


def stem(name: str) -> str:
    """What a function that the compiler sees through is called in an implementation's module."""
    return name.removesuffix("_forward")


def candidates(op: str, compiles: bool) -> tuple[str, ...]:
    """The op's implementations that may be tried: plain torch for the compiler to fuse only where one compiles."""
    return tuple(name for name in AVAILABLE[op] if compiles or name != "plain")


def _drawn(value: Any, device: torch.device | str) -> Any:
    value = restored(value, device)
    for x in value if isinstance(value, list) else [value]:
        if isinstance(x, Tensor) and x.is_floating_point():
            # an expanded gradient has its rows in one place
            x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())].normal_()
    return value


def _names(call: str) -> list[str]:
    """Of the op's arguments but the implementation."""
    assert call in CALLS, f"{call} is not registered"
    return [argument.name for argument in getattr(torch.ops.tessera, call).default._schema.arguments[:-1]]

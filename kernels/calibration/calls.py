"""What a run calls: of every op that the frozen table may decide, the shapes it is given.

A call is seen where torch dispatches it, so that whatever leads there (a method, a block, a benchmark) need not know.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.choice import CALLS, listed


@dataclass(frozen=True)
class Call:
    """One call of a registered op, as JSON: its tensors are given by dtype, shape and strides, and by values where the values are
    shapes themselves (how long each sequence is)."""

    name: str
    arguments: Mapping[str, Any]

    @staticmethod
    def of(name: str, arguments: Mapping[str, Any]) -> "Call":
        return Call(name, {key: _described(value) for key, value in arguments.items()})

    @property
    def op(self) -> str:
        return CALLS[self.name].op

    @property
    def shape_class(self) -> str:
        """Under which the frozen table has it."""
        return CALLS[self.name].shape_class(*(restored(value, "meta") for value in self.arguments.values()))

    @property
    def elements(self) -> int:
        """Of all its tensors."""
        return sum(prod(x["shape"]) for value in self.arguments.values() for x in _tensors(value))

    @property
    def shapes(self) -> str:
        """For people: `qkv 2048x3x4x32, cu_seqlens 11`; of a list of tensors their number and elements, `moments 24 of 85056`."""
        found = []
        for key, value in self.arguments.items():
            if _is_tensor(value):
                found.append(f"{key} {'x'.join(map(str, value['shape']))}")
            elif _tensors(value):
                found.append(f"{key} {len(value)} of {sum(prod(x['shape']) for x in value)}")
        return ", ".join(found)


def keep_largest(found: dict[tuple[str, str], Call], call: Call) -> None:
    """Among those found, by op and class of shapes, put this call where it is the first or the largest."""
    key = call.name, call.shape_class
    if key not in found or call.elements > found[key].elements:
        found[key] = call


@contextmanager
def listing() -> Iterator[list[Call]]:
    """Inside, the calls of ops are listed: of each class of shapes the largest. For fake tensors, with which nothing is computed;
    in a FakeTensorMode that allows real ones.
    """
    found: dict[tuple[str, str], Call] = {}
    calls: list[Call] = []
    with listed(), _Watch(found):
        yield calls
    calls += found.values()


class _Watch(TorchDispatchMode):
    def __init__(self, found: dict[tuple[str, str], Call]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("tessera::")
        if name in CALLS and CALLS[name].shape_class is not None:
            names = [argument.name for argument in func._schema.arguments]
            with unset_fake_temporarily():
                # the last one is the implementation
                keep_largest(self.found, Call.of(name, dict(zip(names[:-1], args, strict=False))))
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given) and "device" not in kwargs:
            with unset_fake_temporarily():  # what the host works out for itself, it looks at
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def restored(value: Any, device: torch.device | str) -> Any:
    """A described argument: tensors with their values where those are known, else as they lie in memory."""
    if isinstance(value, list) and _tensors(value):
        return [restored(each, device) for each in value]
    if not _is_tensor(value):
        return value
    dtype = getattr(torch, value["dtype"])
    if value["values"] is not None and str(device) != "meta":
        return torch.tensor(value["values"], dtype=dtype, device=device)
    return torch.empty_strided(value["shape"], value["stride"], dtype=dtype, device=device)


def _described(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    if not isinstance(value, Tensor):
        return value
    values = None
    if not value.is_floating_point() and not isinstance(value, FakeTensor) and value.device.type != "meta":
        values = value.tolist()
    return {
        "dtype": str(value.dtype).removeprefix("torch."), "shape": list(map(int, value.shape)),
        "stride": list(map(int, value.stride())), "values": values,
    }  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and "dtype" in value


def _tensors(value: Any) -> list[Any]:
    """The described tensors in an argument."""
    return [value] if _is_tensor(value) else [x for x in value if _is_tensor(x)] if isinstance(value, list) else []

"""What the kernel benchmarks share: the machine at hand, and a case, one op at one shape in all its forms.

`bench_OP.py` lists the cases of an op. `python -m benchmarks.gpu` times them all and writes a record; at a desk,
`python -m pytest -n 0 benchmarks/kernels --benchmark-only` hands them to pytest-benchmark.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.choice import AVAILABLE
from kernels.cost import Cost

Call = Callable[[], Any]


@dataclass(frozen=True)
class Machine:
    """The device, the dtype that training uses on it, and how much work a case takes there."""

    device: str
    dtype: torch.dtype
    tokens: int
    """Packed tokens of an attention case."""
    images: int
    """Images of a masked-image case."""
    rows: int
    """Queries of a look-up, rows of a loss."""
    keys: int
    """Keys of a look-up, columns of a loss."""

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


GPU = Machine("cuda", torch.bfloat16, tokens=2**20, images=1024, rows=1024, keys=65536)
CPU = Machine("cpu", torch.float32, tokens=2**11, images=8, rows=128, keys=4096)


def machine() -> Machine:
    """A GPU's where torch sees one, else a CPU's."""
    return GPU if torch.cuda.is_available() else CPU


@dataclass(frozen=True)
class Case:
    """One op at one shape and in one direction.

    `inputs` makes fresh tensors; a form takes them and returns the call that is timed, or raises where it cannot run.
    `ours` are the forms that are implementations of the op; the others are peers.
    """

    op: str
    name: str
    cost: Cost
    inputs: Callable[[], tuple]
    forms: dict[str, Callable[..., Call]]
    ours: tuple[str, ...]


def every_form(cases: Iterable[Case]) -> list:
    """What pytest's parametrize takes: (case, form), named by both."""
    return [pytest.param(case, form, id=f"{case.name}-{form}") for case in cases for form in case.forms]


def directions(
    op: str,
    name: str,
    costs: tuple[Cost, Cost],
    inputs: Callable[[], tuple],
    op_call: Callable[..., Tensor],
    peers: dict[str, Callable[..., Tensor]],
    leaves: Sequence[int],
) -> Iterator[Case]:
    """A case for forward and one for backward. The calls map inputs to one tensor; `leaves` are the places of the inputs
    that get a gradient."""
    calls = {one: _with(op, one, op_call) for one in implementations(op)} | peers
    for direction, cost in zip(("forward", "backward"), costs, strict=True):
        timed = _forward if direction == "forward" else _backward
        forms = {form: _timed(timed, call, tuple(leaves)) for form, call in calls.items()}
        yield Case(op, f"{name}, {direction}", cost, inputs, forms, implementations(op))


def only_forward(
    op: str,
    name: str,
    cost: Cost,
    inputs: Callable[[], tuple],
    op_call: Callable[..., Any],
    peers: dict[str, Callable[..., Any]],
) -> Case:
    calls = {one: _with(op, one, op_call) for one in implementations(op)} | peers
    forms = {form: _timed(_forward, call, ()) for form, call in calls.items()}
    return Case(op, name, cost, inputs, forms, implementations(op))


def implementations(op: str) -> tuple[str, ...]:
    """Of the op, those that run here: without a GPU those in plain torch."""
    return tuple(one for one in AVAILABLE[op] if torch.cuda.is_available() or one in ("reference", "plain"))


def _with(op: str, implementation: str, call: Callable) -> Callable:
    if implementation == "plain":  # it is written for the compiler
        call = torch.compile(call, dynamic=False)

    def run(*inputs: Any) -> Any:
        kernels.use(implementation, op)
        return call(*inputs)

    return run


def _timed(timed: Callable, call: Callable, leaves: tuple[int, ...]) -> Callable[..., Call]:
    return lambda *inputs: timed(call, inputs, leaves)


def _forward(call: Callable, inputs: tuple, leaves: tuple[int, ...]) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call(*inputs)

    run()
    return run


def _backward(call: Callable, inputs: tuple, leaves: tuple[int, ...]) -> Call:
    inputs = tuple(x.detach().requires_grad_() if i in leaves else x for i, x in enumerate(inputs))
    asked = [inputs[i] for i in leaves]
    out = call(*inputs)
    direction = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, asked, direction, retain_graph=True)

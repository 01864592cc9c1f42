"""What the kernel benchmarks share: the machine at hand, and a case, one op at one shape in all its forms.

`bench_OP.py` lists the cases of an op. `python -m benchmarks.gpu` checks and times them all and writes a record; at a desk,
`python -m pytest -n 0 benchmarks/kernels --benchmark-only` hands them to pytest-benchmark.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.choice import AVAILABLE
from kernels.cost import Cost

Call = Callable[[], Any]
Outputs = tuple[Tensor, ...]

# implementations that run on one kind of device only
OF_CPUS, OF_GPUS = ("written", "flash"), ("triton", "cuda")
# those, for GPUs, whose kernels others wrote: peers, which a machine may lack and which need not take every case
OF_OTHERS = ("efficient", "cudnn", "xformers", "apex")
FORWARD, BACKWARD = "forward", "backward"


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


def _the_output(out: Tensor, inputs: tuple) -> Outputs:
    return (out,)


def _whole(inputs: tuple) -> tuple[tuple, None]:
    return inputs, None


@dataclass(frozen=True)
class Case:
    """One op at one shape, in all its forms: our implementations and what else computes the same.

    Every form maps the inputs to what the op returns; a peer that this machine lacks raises when it is called. Those that
    torch compiles have names that begin with "compiled".
    """

    op: str
    name: str
    costs: tuple[Cost, ...]
    """Of forward and, where it is timed, of backward."""
    inputs: Callable[[], tuple]
    """Makes fresh tensors."""
    call: Callable[..., Any]
    """The op."""
    formula: Callable[..., Any]
    """The usual way to write it in plain torch: a peer, and in float64 the truth."""
    peers: dict[str, Callable[..., Any]]
    """More peers."""
    leaves: tuple[int, ...] = ()
    """The places of the inputs that get a gradient."""
    outputs: Callable[[Any, tuple], Outputs] = _the_output
    """Of what a form returns and its inputs: the tensors that are compared with the truth."""
    in_place: bool = False
    """Whether the op writes to its inputs."""
    ends_in: tuple[str, ...] = ()
    """Other ops that the call runs: on the same implementation, or on Triton's where they have none of that name."""
    part: Callable[[tuple], tuple[tuple, Tensor | None]] = _whole
    """The inputs that stand for all of them in float64, and the rows of outputs and gradients that belong to them; None: all."""

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD, BACKWARD)[: len(self.costs)]

    @property
    def ours(self) -> dict[str, Callable[..., Any]]:
        """By implementation, and the plain one also compiled, for which it is written."""
        found = {name: self._on(name, self.call) for name in implementations(self.op)}
        if "plain" in found:
            found["compiled plain"] = self._on("plain", _compiled(self.call))
        return found

    def _on(self, implementation: str, call: Callable) -> Callable:
        @cache
        def choose() -> None:
            kernels.use(implementation, self.op)
            for op in self.ends_in:
                kernels.use(implementation if implementation in AVAILABLE[op] else "triton", op)

        def run(*inputs: Any) -> Any:
            choose()  # once: a call that is timed shall do nothing else
            return call(*inputs)

        return run

    @property
    def theirs(self) -> dict[str, Callable[..., Any]]:
        wrapped = [one for one in OF_OTHERS if one in AVAILABLE[self.op]] if torch.cuda.is_available() else []
        through_us = {f"our op on {name}": self._on(name, self.call) for name in wrapped}
        return {"formula": self.formula, **self.peers, **through_us, "compiled formula": _compiled(self.formula)}

    @property
    def forms(self) -> dict[str, Callable[..., Any]]:
        return self.ours | self.theirs


def implementations(op: str) -> tuple[str, ...]:
    """Of the op, ours that run here."""
    left_out = (*OF_OTHERS, *(OF_CPUS if torch.cuda.is_available() else OF_GPUS))
    return tuple(one for one in AVAILABLE[op] if one not in left_out)


def wide(x: Tensor) -> Tensor:
    """In fp32, or in float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cases(module: str, at: Machine) -> Iterator[Case]:
    """Those that a module lists."""
    return importlib.import_module(module).cases(at)


def case(module: str, name: str, at: Machine) -> Case:
    return next(one for one in cases(module, at) if one.name == name)


def prepared(form: Callable[..., Any], one: Case, direction: str, inputs: tuple) -> Call:
    """A form's call on these inputs in one direction, which has run once: backward that of a graph which is kept."""
    if direction == FORWARD:

        def run() -> Any:
            with torch.no_grad():
                return form(*inputs)

        run()
        return run
    inputs = with_leaves(one, inputs)
    asked = [inputs[i] for i in one.leaves]
    out = form(*inputs)
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, asked, gradient, retain_graph=True)


def with_leaves(one: Case, inputs: tuple) -> tuple:
    """The same inputs; those that get a gradient ask for it."""
    return tuple(x.detach().requires_grad_() if i in one.leaves else x for i, x in enumerate(inputs))


def _compiled(function: Callable) -> Callable:
    """Compiled when it is called first: the compiler takes seconds to load."""

    @cache
    def made() -> Callable:
        return torch.compile(function, dynamic=False)

    return lambda *inputs: made()(*inputs)

"""A CUDA graph's stand-in on a CPU: the operations that work calls are listed, and called again on the same tensors."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# what the host reads, or what has a shape that hangs on content: a device would have to be waited for
WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
# functions that look at values on a CPU only: ours that check ranges, and the one that calls torch's one_hot, which checks
LOOKING_ON_CPUS = {("kernels/checks.py", "<genexpr>"), ("engine/model/heads.py", "targets")}
ROOT = Path(__file__).parents[1]


class _Listing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict, Any]] = []
        self.outside: list[Tensor] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITING and _asking() not in LOOKING_ON_CPUS:
            raise RuntimeError(f"{func} waits for the device")
        places = {x: x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.outside += [x for x, place in places.items() if place not in self._made]
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self._made |= {x.untyped_storage().data_ptr() for x in made} - set(places.values())
        self.calls.append(tree_map(_where_it_lies, (func, args, kwargs or {}, out)))
        return out


def _where_it_lies(x: Any) -> Any:
    """The memory that a tensor has now, which its owner may exchange."""
    return x.detach() if isinstance(x, Tensor) else x


def _asking() -> tuple[str, str]:
    """The file and the function of this repository, but for tests, that called the operation."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith((f"{ROOT}/engine", f"{ROOT}/kernels")):
            return str(Path(file).relative_to(ROOT)), frame.f_code.co_name
        frame = frame.f_back
    return "", ""


class Played:
    """A recorder of `engine.training.graphs`.

    It does work once while it captures, as a device would not: work must change nothing in place but what it made itself. Memory
    that work frees is not used again, so tensors that nobody keeps stay as they were, which on a device they would not: `outside`
    has those that work read and had not made.
    """

    def warm_up(self, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return work()

    def capture(self, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        with _Listing() as listing:
            report = work()
        self.calls, self.outside = listing.calls, listing.outside
        return report

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

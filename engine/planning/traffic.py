"""What a step launches and moves through a GPU's memory, by kernel, on the device that computes nothing.

Counted: launches; cuBLAS's products and attention with their operations; bytes that each of aten's operations and of our kernels
reads and writes if each tensor that it is given or makes crosses memory once (picked rows count, not what they are picked from;
Sinkhorn reads its scores in each iteration), and what inductor says of its own kernels. cuBLAS's and flash attention's own
re-reading is not in it, nor what caches save.
"""

import ctypes
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.model.tokens import Layout
from kernels.packed_attention import cost

KINDS = ("launch", "product", "memset", "copy_on_device")  # what of a record's lines a GPU has to start
MAKING = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")  # of one for its shape
PICKING = ("gather", "index", "index_select", "embedding")
ATTENTION = ("packed_attention_forward", "packed_attention_backward")


class Work(NamedTuple):
    """Of one call. `unit` does the operations: half (matrix products in 16 bits), single (in fp32 or TF32), attention."""

    bytes: int
    flops: int = 0
    unit: str = "half"


@dataclass
class Moved:
    """By one operation, or by one kernel of inductor's, over a step: in which part of it, and how often it did which work."""

    part: str
    name: str
    launches: int = 0
    work: Counter[Work] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        return self.work.total()

    @property
    def bytes(self) -> int:
        return sum(work.bytes * calls for work, calls in self.work.items())

    @property
    def flops(self) -> int:
        return sum(work.flops * calls for work, calls in self.work.items())

    def as_json(self) -> dict[str, Any]:
        work = [[*work, calls] for work, calls in self.work.items()]
        return {"part": self.part, "name": self.name, "launches": self.launches, "work": work}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Moved":
        work = Counter({Work(*of): calls for *of, calls in saved["work"]})
        return cls(saved["part"], saved["name"], saved["launches"], work)


class Account(TorchDispatchMode):
    """Writes down what launches while it is the mode; `found` by part of the step and name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], Moved] = {}
        self.layouts: dict[int, Layout] = {}  # by where their offsets lie, which nobody can read here
        self._log = ctypes.CDLL("libcuda.so.1")
        self._log.nullcuda_count.restype = ctypes.c_long

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        before = self._log.nullcuda_count()
        inside: list[Moved] = []
        if func.namespace == "tessera":  # seen from inside, but for the kernels of our own that it launches
            outside, self.found = self.found, {}
            with self:
                out = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            inside, self.found = list(self.found.values()), outside
        else:
            out = func(*args, **kwargs)
        launches = self._log.nullcuda_count() - before - sum(of.launches for of in inside)
        bytes = moved(func, args, kwargs, out) if launches else 0
        if name in ATTENTION:  # one row, since memory and arithmetic overlap in it
            launches += sum(of.launches for of in inside)
            bytes += sum(of.bytes for of in inside)
            self.add(name, launches, Work(bytes, self._attention_flops(name, args), "attention"))
            return out
        for of in inside:
            self._row(of.part, of.name).launches += of.launches
            self._row(of.part, of.name).work.update(of.work)
        if launches:
            wide = all(t.dtype == torch.float32 for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            self.add(name, launches, Work(bytes, flops(func, args, kwargs, out), "single" if wide else "half"))
        return out

    def add(self, name: str, launches: int, work: Work) -> None:
        """A call, of the part that the step is in."""
        row = self._row("backward" if torch._C._current_graph_task_id() != -1 else "forward, update", name)
        row.launches += launches
        row.work[work] += 1

    def _attention_flops(self, name: str, args: tuple) -> int:
        qkv, cu_seqlens = (args[0], args[1]) if name == ATTENTION[0] else (args[1], args[4])
        of_group = [
            (group.sequences, cost([group.length], qkv.shape[2], qkv.shape[3], qkv.element_size()))
            for group in self.layouts[cu_seqlens.data_ptr()].groups
        ]
        return sum(sequences * both[ATTENTION.index(name)].flops for sequences, both in of_group)

    def _row(self, part: str, name: str) -> Moved:
        return self.found.setdefault((part, name), Moved(part, name))


def touched(tensor: Tensor) -> int:
    """Bytes of its content; what is expanded counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def moved(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operation reads and writes, if each tensor crosses memory once."""
    arguments = func._schema.arguments
    given = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    made = 0 if written else sum(touched(t) for t in tree_leaves(out) if isinstance(t, Tensor))
    name = func._schema.name.split("::")[1]
    if name in MAKING:
        return made
    if name in PICKING:  # of what is picked from, what is picked
        return 2 * made + sum(touched(t) for t in tree_leaves(args[1:]) if isinstance(t, Tensor))
    read, seen = 0, set()
    for key, value in given.items():
        for tensor in (t for t in tree_leaves(value) if isinstance(t, Tensor)):
            made += touched(tensor) * (key in written)
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            only_written = key.startswith("out") or (key == "self" and name in ("copy_", "fill_", "zero_"))
            read += touched(tensor) * (place not in seen and not only_written) * given.get("iterations", 1)
            seen.add(place)
    return read + made


def flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Operations of a product, or of torch's own attention over equal lengths."""
    name = func._schema.name.split("::")[1]
    if name not in ("mm", "addmm", "bmm", "baddbmm") and not name.startswith("_scaled_dot_product"):
        return 0
    plain = {key: value for key, value in kwargs.items() if key != "out"}
    return flop_registry[func._overloadpacket](*args, **plain, out_val=out)


@contextmanager
def accounting(account: Account) -> Iterator[None]:
    """Around all steps, those before the counted one, too: lets the account see inductor's own kernels, by the bytes it says they
    move, and the lengths of sequences. Kernels that take any size say so of the first block they are compiled for, of which
    stochastic depth drops least: others in proportion to the largest."""
    import torch._inductor.config
    from torch._inductor.runtime import triton_heuristics

    torch._inductor.config.benchmark_kernel = True  # has it say what its kernels move
    run, offsets, largest = triton_heuristics.CachingAutotuner.run, Layout.cu_seqlens, defaultdict(int)

    def seen(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        given = sum(touched(arg) for arg in args if isinstance(arg, Tensor))
        largest[id(kernel)] = max(given, largest[id(kernel)])
        share, says = given / largest[id(kernel)], kernel.inductor_meta
        if _get_current_dispatch_mode() is account:
            # of casts in one launch it doesn't say; they read or write all that they are given
            moves = int(1e9 * says["kernel_num_gb"] * share) if "kernel_num_gb" in says else given
            account.add(says["kernel_name"], 1, Work(moves))
        return run(kernel, *args, **kwargs)

    def noted(layout: Layout, device: torch.device | str) -> Tensor:
        made = offsets(layout, device)
        account.layouts[made.data_ptr()] = layout
        return made

    triton_heuristics.CachingAutotuner.run, Layout.cu_seqlens = seen, noted
    try:
        yield
    finally:
        triton_heuristics.CachingAutotuner.run, Layout.cu_seqlens = run, offsets


def total(rows: Iterable[Moved]) -> Moved:
    """All of them as one."""
    whole = Moved("", "")
    for row in rows:
        whole.launches += row.launches
        whole.work.update(row.work)
    return whole

"""What a warm step of a method launches and moves through a GPU's memory, by kernel, on the device that computes nothing.

    python -m tests.null_device.traffic dino vit_large_patch16_224 64 [--kernels triton] [--residual bf16] [--eager] [--stage 0]

Counted: launches, cuBLAS calls and their operations; bytes that each of aten's operations and of our kernels reads and writes if
each tensor that it is given or makes crosses memory once (picked rows count, not what they are picked from; Sinkhorn reads its
scores in each iteration), and what inductor says of its own kernels. cuBLAS's and flash attention's own re-reading is not in it,
nor what caches save, nor attention's operations. Modelled, from these: milliseconds, of each kernel the longer of bytes /
bandwidth and operations / rate, and 3 us a launch.
"""

import argparse
import ctypes
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import kernels
from engine.model import depth, residual, vit
from engine.training import config
from engine.training.calls import without_data
from kernels.resources.rates import CHIPS
from tests.null_device import device
from tests.null_device.ledger import WARM, recorded
from tests.null_device.steps import CLASSES, stepping

KINDS = ("launch", "product", "memset", "copy_on_device")  # what of a log's lines a GPU has to start
MAKING = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")  # of one for its shape
PICKING = ("gather", "index", "index_select", "embedding")
# of an H200: bytes/s, operations/s in 16 bits and in TF32; seconds a launch
BANDWIDTH, RATE, TF32_RATE, GAP = CHIPS["H200"].dram, 790e12, 395e12, 3e-6


@dataclass
class Moved:
    """By one operation, or by one kernel of inductor's, over a step."""

    calls: int = 0
    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, launches: int, bytes: int, flops: int, rate: float) -> None:
        self.calls, self.launches = self.calls + 1, self.launches + launches
        self.bytes, self.flops = self.bytes + bytes, self.flops + flops
        self.seconds += max(bytes / BANDWIDTH, flops / rate) + GAP * launches


def touched(tensor: Tensor) -> int:
    """Bytes of its content; what is expanded counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


class Account(TorchDispatchMode):
    """Writes down what launches while it is the mode; `found` by part of the step and name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], Moved] = defaultdict(Moved)
        self.log = ctypes.CDLL("libcuda.so.1")
        self.log.nullcuda_count.restype = ctypes.c_long

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        before = self.log.nullcuda_count()
        if func.namespace == "tessera":  # seen from inside, but for the kernels of our own that it launches
            attributed = self.attributed()
            with self:
                out = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            before += self.attributed() - attributed
        else:
            out = func(*args, **kwargs)
        launches = self.log.nullcuda_count() - before
        if launches:
            wide = all(t.dtype == torch.float32 for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            rate = TF32_RATE if wide else RATE
            self.add(
                func._schema.name.split("::")[1],
                launches,
                moved(func, args, kwargs, out),
                flops(func, args, kwargs, out),
                rate,
            )
        return out

    def attributed(self) -> int:
        return sum(of.launches for of in self.found.values())

    def add(self, name: str, *what: Any) -> None:
        part = "backward" if torch._C._current_graph_task_id() != -1 else "forward, update"
        self.found[part, name].add(*what)


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
    """Operations of a product."""
    name = func._schema.name.split("::")[1]
    if name not in ("mm", "addmm", "bmm", "baddbmm"):
        return 0
    plain = {key: value for key, value in kwargs.items() if key != "out"}
    return flop_registry[func._overloadpacket](*args, **plain, out_val=out)


@contextmanager
def of_inductor(account: Account) -> Iterator[None]:
    """Inductor's own kernels are written down too, by the bytes it says they move. Those that take any size say so of the first
    block they are compiled for, of which stochastic depth drops least: others in proportion to the largest."""
    from torch._inductor.runtime import triton_heuristics

    run, largest = triton_heuristics.CachingAutotuner.run, defaultdict(int)

    def seen(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        given = sum(touched(arg) for arg in args if isinstance(arg, Tensor))
        largest[id(kernel)] = max(given, largest[id(kernel)])
        share, says = given / largest[id(kernel)], kernel.inductor_meta
        if torch.utils._python_dispatch._get_current_dispatch_mode() is account:
            # of casts in one launch it doesn't say; they read or write all that they are given
            moves = int(1e9 * says["kernel_num_gb"] * share) if "kernel_num_gb" in says else given
            account.add(says["kernel_name"], 1, moves, 0, RATE)
        return run(kernel, *args, **kwargs)

    triton_heuristics.CachingAutotuner.run = seen
    try:
        yield
    finally:
        triton_heuristics.CachingAutotuner.run = run


def counted(options: argparse.Namespace) -> dict[str, Any]:
    """In the process that sees the device: the last stage's warm step."""
    torch._inductor.config.benchmark_kernel = True  # has it say what its kernels move
    flags = ["--method", options.method, "--model", options.model, "--preset", "plain", "--device", "cuda"]
    plan = config.parse([*flags, "--batch-size", str(options.batch)])
    torch.set_float32_matmul_precision("high")  # as training does
    kernels.use(options.kernels)
    torch.manual_seed(0)
    if options.drops_from is not None:
        depth.DROPS_FROM["cuda"] = options.drops_from
    changes = {} if options.drop_path is None else {"drop_path": options.drop_path}
    encoder = vit.create(plan.model, **(plan.encoder | changes))
    stage = len(plan.stages) - 1 if options.stage is None else options.stage
    method = without_data(*plan.stages[stage], encoder, CLASSES)
    residual.choose(method, options.residual)
    step, account = stepping(method, not options.eager, stage), Account()
    with of_inductor(account):
        for number in range(WARM):
            step(number)
        torch.cuda.reset_peak_memory_stats()
        with recorded() as events, account:
            step(WARM)
    launches = sum(event.kind in KINDS for event in events)
    rows = sorted(((*key, asdict(of)) for key, of in account.found.items()), key=lambda row: -row[2]["bytes"])
    return {"launches": launches, "peak": torch.cuda.max_memory_allocated(), "kernels": rows}


def show(found: dict[str, Any], rows: int) -> None:
    moving = [of for _, _, of in found["kernels"]]
    total = {key: sum(of[key] for of in moving) for key in moving[0]}
    counts = f"{found['launches']} launches, {total['launches']} of them attributed, {total['bytes'] / 1e9:.1f} GB"
    print(f"{counts}, {total['flops'] / 1e12:.1f} TF in products, peak {found['peak'] / 2**30:.1f} GiB")
    print(f"{1e3 * total['seconds']:.1f} ms (modelled)")
    for part, name, of in found["kernels"][:rows]:
        print(
            f"{of['bytes'] / 1e9:8.2f} GB {of['flops'] / 1e12:7.2f} TF {1e3 * of['seconds']:8.2f} ms {of['calls']:6} calls "
            f"{of['launches']:6} launches  {part:16} {name[:90]}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("method")
    parser.add_argument("model")
    parser.add_argument("batch", type=int)
    parser.add_argument("--eager", action="store_true", help="not compiled")
    parser.add_argument("--kernels", default="reference", help="which form of ours runs, as engine.train takes it")
    parser.add_argument("--residual", choices=residual.DTYPES, default="fp32")
    parser.add_argument("--stage", type=int, help="of the recipe; the last one where nothing is said")
    parser.add_argument("--drop-path", type=float, help="stochastic depth of the last block, instead of the recipe's")
    parser.add_argument(
        "--drops-from", type=float, help="the rate from which rows are dropped, instead of the engine's"
    )
    parser.add_argument("--chip", type=int, choices=device.CHIPS, default=90)
    parser.add_argument("--rows", type=int, default=30)
    options = parser.parse_args()
    if "NULLCUDA_SM" in os.environ:
        print(json.dumps(counted(options)))
        return 0
    with device.built() as on_device:
        show(device.answer("traffic", sys.argv[1:], on_device(options.chip)), options.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

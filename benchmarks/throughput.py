"""Whole training steps on images that lie ready: images/s, and the share of what the machine's matrix product can do.

    python -m benchmarks.throughput --method mae --model vit_small_patch16_224

Ours, a peer written the usual way where there is one (MAE), and a large matrix product are timed in turn, round by round, so
that a machine whose speed drifts slows all of them alike; ratios are taken within a round, and the median is shown.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import kernels
from benchmarks.peers.plain_mae import PlainMae
from engine import dist, methods, recipes, vit
from engine.draws import Draws
from engine.errors import BadInput
from engine.flags import read
from engine.step import AUTOCAST, Update
from engine.train import compile_regions


@dataclass(frozen=True)
class Options:
    """Time the training step of a method."""

    method: str = "mae"
    """mae, nnclr or maect."""
    model: str = "vit_small_patch16_224"
    """A timm ViT name."""
    batch_size: int = 32
    """Images of a step."""
    compile: bool = True
    """Compile, ours and the peer."""
    precision: str = "auto"
    """fp32 or bf16; auto is bf16 on GPUs and fp32 on CPUs."""
    device: str = "auto"
    """auto, cpu or cuda."""
    rounds: int = 5
    """Rounds; each times every candidate once."""
    steps: int = 3
    """Steps of a candidate in a round."""
    peer: bool = True
    """Time the peer, too."""
    out: str = ""
    """A JSON file for the record; empty writes none."""


def ours(options: Options, device: torch.device, precision: str) -> tuple[Callable[[], None], float]:
    """One step of ours on fixed images, and its floating-point operations per image."""
    recipe = recipes.recipe(options.method, options.model, "plain", embedded=False)
    name, settings = recipe.stages[-1]
    sizes = {"batch_size": options.batch_size}
    if hasattr(settings, "queue_size"):
        sizes["queue_size"] = settings.queue_size // options.batch_size * options.batch_size
    settings = type(settings)(**(asdict(settings) | sizes))
    torch.manual_seed(0)
    encoder = vit.create(options.model, **recipe.encoder)
    method = methods.get(name)(encoder, settings).to(device).train()
    if options.compile:
        compile_regions(method)
    update = Update(method, 1000, precision)
    images = tuple(torch.randn(options.batch_size, 3, *encoder.img_size, device=device) for _ in method.views())
    ids = torch.arange(options.batch_size, device=device)
    drawn = method.draw(Draws(0, batch=options.batch_size, rows=slice(None), device=device))
    return lambda: update(100, images, ids, drawn), method.flops_per_image()


def peer(options: Options, device: torch.device, precision: str) -> Callable[[], None]:
    """One step of the plain MAE: whole-model compile, fused AdamW, the same precision."""
    model = PlainMae(options.model).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    run = torch.compile(model, fullgraph=True) if options.compile else model
    size = model.encoder.patch_embed.img_size
    images = torch.randn(options.batch_size, 3, *size, device=device)
    noise = torch.rand(options.batch_size, model.patches, device=device)
    dtype = AUTOCAST[precision]

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = run(images, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matrix_product(device: torch.device, precision: str) -> tuple[Callable[[], None], float]:
    """A large square product, and its operations: what the peak is taken from."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = AUTOCAST[precision] or torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: torch.mm(a, b), 2.0 * side**3


def seconds(run: Callable[[], None], times: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def measure(options: Options) -> dict:
    """Time everything; returns the record."""
    device = dist.start(options.device).device
    precision = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(options.precision, options.precision)
    if precision not in AUTOCAST:
        raise BadInput(f"--precision is {options.precision!r}; choose auto, {', '.join(AUTOCAST)}.")
    step, flops = ours(options, device, precision)
    product, product_flops = matrix_product(device, precision)
    candidates: dict[str, Callable[[], None]] = {"ours": step}
    if options.peer and options.method == "mae":
        candidates["plain MAE, timm blocks"] = peer(options, device, precision)
    first = {name: seconds(run, 1, device) for name, run in candidates.items()}
    for run in (*candidates.values(), product):
        seconds(run, 2, device)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for _ in range(options.rounds):
        before = product_flops / seconds(product, 3, device)
        took = {name: seconds(run, options.steps, device) for name, run in candidates.items()}
        peak = max(before, product_flops / seconds(product, 3, device))
        for name, of_step in took.items():
            rate = options.batch_size / of_step
            rounds[name].append({"images_per_second": rate, "share_of_peak": rate * flops / peak, "peak": peak})
    return {
        "options": asdict(options),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": torch.__version__,
        "kernels": kernels.describe(device).splitlines(),
        "flops_per_image": flops,
        "first_step_seconds": first,
        "rounds": rounds,
        "median": {
            name: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for name, found in rounds.items()
        },
    }


def show(record: dict) -> None:
    options = record["options"]
    table = Table(title=f"{options['method']} {options['model']}, batch {options['batch_size']}, {record['precision']}, "
                        f"{record['threads']} threads, medians of {options['rounds']} rounds")  # fmt: skip
    for heading in ("step", "images/s", "TFLOP/s", "share of the matrix product's", "first step (s)"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name, found in record["median"].items():
        tflops = found["images_per_second"] * record["flops_per_image"] / 1e12
        cells = (f"{found['images_per_second']:,.1f}", f"{tflops:.3f}", f"{found['share_of_peak']:.1%}")
        table.add_row(name, *cells, f"{record['first_step_seconds'][name]:.1f}")
    Console().print(table)


def main() -> int:
    try:
        record = measure(read(Options, sys.argv[1:]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(record)
    if record["options"]["out"]:
        Path(record["options"]["out"]).write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

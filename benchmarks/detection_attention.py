"""What windows save a detector's backbone: forward and backward of one large image, with windowed, hybrid and global attention.

    python -m benchmarks.detection_attention --model vit_base_patch16_224 --pixels 1024

windows    all blocks attend inside windows
hybrid     four blocks, at equal distances, attend globally (Li et al. 2021, "Benchmarking Detection Transfer Learning")
global     all blocks do

Each once as it is, through `kernels.packed_attention`, and once with relative position biases, through torch's
scaled_dot_product_attention. All are timed in turn (see `benchmarks.rounds`); ratios are images per second against windows alone,
and the share of the matrix product counts the operations that these make, so that what a form makes beyond counts as lost. Peak
memory is that of a step (see `benchmarks.rounds.prepared`), without optimiser.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import rounds
from benchmarks.rounds import Make, Step
from engine.core.errors import BadInput
from engine.evals.detection import Form, WindowedViT
from engine.evals.detection.backbone import tiling
from engine.model import vit
from engine.training.precision import AUTOCAST

BASE, BIASES = "windows", ", biases"


@dataclass(frozen=True)
class Options(rounds.Options):
    """Time a detector's backbone with windowed, hybrid and global attention."""

    model: str = "vit_base_patch16_224"
    """A timm ViT name."""
    batch_size: int = 1
    rounds: int = 3
    steps: int = 1
    pixels: int = 1024
    """Side of the image."""
    window: int = 14
    """Side of a window in patches."""
    forms: tuple[str, ...] = ()
    """Only these; empty: all."""
    memory: bool = True
    """Measure peak memory; on CPUs this builds, and compiles, every form once more."""


def _backbone(options: Options, global_blocks: int | None, relative: bool) -> WindowedViT:
    torch.manual_seed(0)
    encoder = vit.create(options.model)
    count = encoder.depth if global_blocks is None else global_blocks
    form = Form(size=options.pixels, window=options.window, global_blocks=count, relative=relative)
    return WindowedViT(encoder, form)


def _made(options: Options, device: torch.device, precision: str, *, global_blocks: int | None, relative: bool) -> Step:
    model = _backbone(options, global_blocks, relative).to(device).train()
    if options.compile:
        for owner, name in model.regions():
            setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True, dynamic=False))
    images = torch.randn(options.batch_size, 3, options.pixels, options.pixels, device=device)
    dtype = AUTOCAST[precision]

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = sum(found.float().square().mean() for found in model(images))
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


FORMS: dict[str, Make] = {
    name + suffix: partial(_made, global_blocks=blocks, relative=bool(suffix))
    for suffix in ("", BIASES)
    for name, blocks in ((BASE, 0), ("hybrid", 4), ("global", None))
}


def flops(options: Options) -> float:
    """Operations of forward and backward of one image with windows alone: matrix products, two per multiply-add."""
    model = _backbone(options, 0, False)
    encoder, side = model.encoder, options.pixels // model.encoder.patch_size
    sizes = tiling((side, side), options.window, torch.device("cpu")).sizes
    blocks = sum(block.flops(h * w) * count for block in encoder.blocks for h, w, count in sizes)
    return 3.0 * (2.0 * side**2 * encoder.patch_embed.proj.weight.numel() + blocks)


def biased_scores(options: Options, global_blocks: int | None) -> float:
    """Bytes, roughly, that scores with biases of global blocks take on a CPU: eight times one block's for the bias and its
    gradient, one and a half for each block, as measured with vit_micro_patch8_32 at 256 pixels."""
    architecture = vit.create(options.model).architecture
    blocks = architecture.depth if global_blocks is None else global_blocks
    scores = 4.0 * architecture.num_heads * options.batch_size * (options.pixels // architecture.patch_size) ** 4
    return (8 + 1.5 * blocks) * scores if blocks else 0.0


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def measure(options: Options) -> dict[str, Any]:
    """Time every form; returns the record. A form that fails, for want of memory say, says why under "left_out"."""
    wrong = [form for form in options.forms if form not in FORMS]
    if wrong:
        raise BadInput(f"--forms has no {wrong[0]!r}; choose from {'; '.join(FORMS)}.")
    if options.window < 1:
        raise BadInput(f"--window is {options.window}; it must be a whole number from 1.")
    device, precision = rounds.machine(options)
    operations = flops(options)
    chosen, left_out = {}, {}
    for form in options.forms or FORMS:
        needed = biased_scores(options, FORMS[form].keywords["global_blocks"]) if BIASES in form else 0
        if device.type == "cpu" and needed > (free := _free_memory()):
            left_out[form] = (
                f"its scores need about {needed / 2**30:.0f} GiB of memory, and {free / 2**30:.0f} are free"
            )
        else:
            chosen[form] = FORMS[form]
    candidates, first, memory, failed = rounds.prepared(chosen, options, device, precision, BASE, options.memory)
    record = rounds.in_turn(candidates, options, device, precision, operations, base=BASE)
    record |= {"first_step_seconds": first, "left_out": left_out | failed}
    return record | ({"peak_memory": memory} if options.memory else {})


def show(record: dict[str, Any]) -> None:
    rounds.show(record, f"backbone on {record['options']['pixels']} pixels:")
    for form, why in record["left_out"].items():
        print(f"{form} is left out: {why}.")


def main(arguments: Sequence[str] | None = None) -> int:
    return rounds.command(Options, measure, show, arguments, "benchmarks.detection_attention")


if __name__ == "__main__":
    sys.exit(main())

"""What a warm step of a method launches and moves through a GPU's memory, kernel by kernel, on the device that computes nothing.

    python -m tests.null_device.traffic dino vit_large_patch16_224 64 [--kernels triton] [--residual bf16] [--eager] [--stage 0]

What is counted, `engine.planning.traffic` says, and what is modelled of it, `engine.planning.bill`; here for one H200 or A100.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch

import kernels
from engine.model import depth, residual
from engine.null_device import device
from engine.planning import bill, cards
from engine.planning.counting import Count, counted
from engine.planning.traffic import total
from engine.training import config
from engine.training.stepping import made_ready, method_of, stepping

CARDS = {80: "A100-80", 90: "H200"}


def step_of(options: argparse.Namespace) -> Count:
    """In the process that sees the device: the last stage's warm step."""
    flags = ["--method", options.method, "--model", options.model, "--preset", "plain", "--device", "cuda"]
    flags += ["--residual", options.residual, "--batch-size", str(options.batch)]
    plan = config.parse([*flags, "--compile", "off" if options.eager else "on"])
    torch.set_float32_matmul_precision("high")  # as training does
    kernels.use(options.kernels)
    torch.manual_seed(0)
    if options.drops_from is not None:
        depth.DROPS_FROM["cuda"] = options.drops_from
    if options.drop_path is not None:
        plan = replace(plan, encoder=plan.encoder | {"drop_path": options.drop_path})
    stage = len(plan.stages) - 1 if options.stage is None else options.stage
    return counted(*stepping(made_ready(method_of(plan, stage), not options.eager), stage, logged=not options.unlogged))


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    count, card = Count.from_json(found), cards.named(CARDS[options.chip])
    of_all, reached = total(count.rows), card.reached[1]
    counts = f"{count.launches} launches, {of_all.launches} of them attributed, {count.bytes / 1e9:.1f} GB"
    print(f"{counts}, {count.flops / 1e12:.1f} TF, peak {count.peak_bytes / 2**30:.1f} GiB")
    print(f"{1e3 * bill.seconds(count.rows, card, reached):.1f} ms (modelled)")
    for row in count.rows[: options.rows]:
        print(
            f"{row.bytes / 1e9:8.2f} GB {row.flops / 1e12:7.2f} TF {1e3 * bill.seconds([row], card, reached):8.2f} ms "
            f"{row.calls:6} calls {row.launches:6} launches  {row.part:16} {row.name[:90]}"
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
    parser.add_argument("--unlogged", action="store_true", help="a step that is not logged, so measures no health")
    parser.add_argument("--chip", type=int, choices=device.CHIPS, default=90)
    parser.add_argument("--rows", type=int, default=30)
    options = parser.parse_args()
    if "NULLCUDA_SM" in os.environ:
        print(json.dumps(step_of(options).as_json()))
        return 0
    with device.built() as on_device:
        seen = on_device(options.chip) | {"NULLCUDA_MEMORY": str(2**42)}
        show(device.answer("tests.null_device.traffic", sys.argv[1:], seen), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

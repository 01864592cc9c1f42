"""Whole training steps on images that lie ready: images/s, and the share of what the machine's matrix product can do.

    python -m benchmarks.throughput --method mae --model vit_small_patch16_224

Ours, a peer written the usual way where there is one (MAE), and a large matrix product are timed in turn (see
`benchmarks.rounds`). `benchmarks.multicrop` has the peers of DINO.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

from benchmarks import rounds
from benchmarks.peers.plain_mae import PlainMae
from benchmarks.rounds import Step, seconds
from benchmarks.steps import published, training_step
from engine import methods
from engine.step import AUTOCAST

OURS, PEER = "ours", "plain MAE, timm blocks"


@dataclass(frozen=True)
class Options(rounds.Options):
    """Time the training step of a method."""

    method: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(methods.names())}.")] = "mae"
    peer: bool = True
    """Time the peer, too."""


def ours(options: Options, device: torch.device, precision: str) -> tuple[Step, float]:
    """One step of ours, and its floating-point operations per image."""
    kind, encoder, settings = published(options.method, options.model, options.batch_size)
    method = kind(encoder, settings)
    return training_step(method, device, precision, options.compile), method.flops_per_image()


def peer(options: Options, device: torch.device, precision: str) -> Step:
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


def measure(options: Options) -> dict[str, Any]:
    """Time everything; returns the record."""
    device, precision = rounds.machine(options)
    step, flops = ours(options, device, precision)
    candidates = {OURS: step}
    if options.peer and options.method == "mae":
        candidates[PEER] = peer(options, device, precision)
    first = {name: seconds(run, 1, device) for name, run in candidates.items()}
    return rounds.in_turn(candidates, options, device, precision, flops, base=PEER) | {"first_step_seconds": first}


def main(arguments: Sequence[str] | None = None) -> int:
    def show(record: dict[str, Any]) -> None:
        rounds.show(record, record["options"]["method"])

    return rounds.command(Options, measure, show, arguments, "benchmarks.throughput")


if __name__ == "__main__":
    sys.exit(main())

"""Whole training steps on images that lie ready: images/s, and the share of what the machine's matrix product can do.

    python -m benchmarks.throughput --method mae --model vit_small_patch16_224

Ours, a peer where there is one, and a large matrix product are timed in turn (see `benchmarks.rounds`). MAE's peer is written the
usual way; those of MoCo v3 and SimMIM are made of lightly's modules, where they are installed (uv run --group peers ...).
`benchmarks.multicrop` has the peers of DINO.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

from benchmarks import rounds
from benchmarks.peers.plain_mae import PlainMae
from benchmarks.rounds import Step, seconds
from benchmarks.steps import built, published, training_step
from engine import methods
from engine.core.errors import BadInput
from engine.training.precision import AUTOCAST

OURS, PLAIN, LIGHTLY = "ours", "plain MAE, timm blocks", "lightly"


@dataclass(frozen=True)
class Options(rounds.Options):
    """Time the training step of a method."""

    method: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(methods.names())}.")] = "mae"
    peer: bool = True
    """Time the peer, too."""
    graphs: bool = False
    """Replay ours from a CUDA graph."""


def ours(options: Options, device: torch.device, precision: str) -> tuple[Step, float]:
    """One step of ours, and its floating-point operations per image. Raises BadInput for graphs that cannot be had."""
    kind, encoder, settings = published(options.method, options.model, options.batch_size)
    why = settings.ungraphed(encoder) if device.type == "cuda" else "graphs are for GPUs"
    if options.graphs and why:
        raise BadInput(f"--graphs cannot be had for {options.method}: {why}.")
    method = built(kind, encoder, settings)
    return training_step(method, device, precision, options.compile, options.graphs), method.flops_per_image()


def plain_mae(options: Options, device: torch.device, precision: str) -> Step:
    """One step of the plain MAE: whole-model compile, fused AdamW, the same precision."""
    model = PlainMae(options.model).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    run = torch.compile(model, fullgraph=True) if options.compile else model
    size = model.encoder.patch_embed.img_size
    images = torch.randn(options.batch_size, 3, *size, device=device)
    noise = torch.rand(options.batch_size, model.patches, device=device)
    return _step(lambda: run(images, noise), optimizer, device, precision)


def lightly_mocov3(options: Options, device: torch.device, precision: str) -> Step:
    """One step of MoCo v3 from lightly's modules: towers and heads compiled as wholes, fused AdamW, the same precision."""
    from benchmarks.peers.lightly_mocov3 import LightlyMocov3

    _, encoder, settings = published(options.method, options.model, options.batch_size)
    model = LightlyMocov3(encoder.architecture, settings).to(device).train()
    if options.compile:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-4, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    images = tuple(torch.randn(2, options.batch_size, 3, *encoder.img_size, device=device).unbind())
    update = _step(lambda: model(images), optimizer, device, precision)

    def step() -> None:
        update()
        model.follow(settings.teacher_momentum)

    return step


def lightly_simmim(options: Options, device: torch.device, precision: str) -> Step:
    """One step of SimMIM from lightly's modules with the masks of ours: whole-model compile, fused AdamW, the same precision."""
    from benchmarks.peers.lightly_simmim import LightlySimmim

    kind, encoder, settings = published(options.method, options.model, options.batch_size)
    method = built(kind, encoder, settings)
    masked = method.masked(torch.rand(options.batch_size, method.units)).to(device)
    model = LightlySimmim(encoder.architecture, encoder.architecture.drop_path).to(device).train()
    if options.compile:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.groups(settings.weight_decay), lr=1e-4, betas=settings.betas, fused=True)
    images = torch.randn(options.batch_size, 3, *encoder.img_size, device=device)
    return _step(lambda: model(images, masked), optimizer, device, precision)


def _step(
    loss_of_batch: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, device: torch.device, precision: str
) -> Step:
    dtype = AUTOCAST[precision]

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


PEERS: dict[str, tuple[str, Callable[[Options, torch.device, str], Step]]] = {
    "mae": (PLAIN, plain_mae),
    "mocov3": (LIGHTLY, lightly_mocov3),
    "simmim": (LIGHTLY, lightly_simmim),
}


def measure(options: Options) -> dict[str, Any]:
    """Time everything; returns the record. A peer that is not installed says so under "left_out"."""
    device, precision = rounds.machine(options)
    step, flops = ours(options, device, precision)
    candidates, left_out = {OURS: step}, {}
    name, peer = PEERS.get(options.method, ("", None))
    if options.peer and name == LIGHTLY and importlib.util.find_spec("lightly") is None:
        left_out[name] = "it is not installed; the dependency group peers has it"
    elif options.peer and peer:
        candidates[name] = peer(options, device, precision)
    first = {name: seconds(run, 1, device) for name, run in candidates.items()}
    record = rounds.in_turn(candidates, options, device, precision, flops, base=name)
    return record | {"first_step_seconds": first, "left_out": left_out}


def show(record: dict[str, Any]) -> None:
    rounds.show(record, record["options"]["method"])
    for peer, why in record["left_out"].items():
        print(f"{peer} is left out: {why}.")


def main(arguments: Sequence[str] | None = None) -> int:
    return rounds.command(Options, measure, show, arguments, "benchmarks.throughput")


if __name__ == "__main__":
    sys.exit(main())

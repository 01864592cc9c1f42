"""DINO steps over 2 large and 8 small crops of an image, in the forms in which they are written.

    python -m benchmarks.multicrop --model vit_small_patch16_224

    packed     ours: all crops in one pass of the backbone; stochastic depth in the form of its rate (`engine.model.depth`)
    per-size   the usual form: one pass per crop size; stochastic depth computes and multiplies by zero, as it does below
    padded     the other usual form: one pass of all crops, small ones padded to the longest, with a mask of keys
    lightly    lightly's modules, where they are installed (uv run --group peers ...)

packed, per-size and padded share heads, loss, clipping, fused AdamW, teacher and operations; tests/benchmarks/test_multicrop.py
shows their losses and gradients equal. lightly has its own, with the same optimiser and rates. Ours, per-size and padded are
compiled block by block and head by head, lightly's towers and loss as wholes. All are timed in turn (see `benchmarks.rounds`);
the share of the matrix product counts the operations that ours makes.

Peak memory is that of a step (see `benchmarks.rounds.prepared`).
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import rounds
from benchmarks.peers.plain_dino import PlainDino
from benchmarks.rounds import Make, Step
from benchmarks.steps import published, training_step
from engine.core.errors import BadInput
from engine.methods.dino import Dino, Settings
from engine.model.vit import VisionTransformer
from engine.training.precision import AUTOCAST

OURS, USUAL = "packed", "per-size"


@dataclass(frozen=True)
class Options(rounds.Options):
    """Time DINO's step over many crops in several forms."""

    batch_size: int = 8
    """Images of a step, each in 10 crops. Ours drops rows of whole crops only where a whole number of them is near the rate."""
    rounds: int = 3
    steps: int = 1
    prototypes: int = 65536
    """Width of the head's last layer."""
    drop_path: float = 0.1
    """Stochastic depth of the student's last block."""
    forms: tuple[str, ...] = ()
    """Only these; empty: all."""
    memory: bool = True
    """Measure peak memory; on CPUs this builds, and compiles, every form once more."""


def _parts(options: Options) -> tuple[VisionTransformer, Settings]:
    """Student and settings: DINO's published recipe but for the flags."""
    encoder = {"drop_path": options.drop_path}
    _, student, settings = published("dino", options.model, options.batch_size, encoder, prototypes=options.prototypes)
    return student, settings


def _ours(options: Options, device: torch.device, precision: str) -> Step:
    return training_step(Dino(*_parts(options)), device, precision, options.compile)


def _plain(options: Options, device: torch.device, precision: str, *, padded: bool) -> Step:
    return training_step(PlainDino(*_parts(options), padded=padded), device, precision, options.compile)


def _lightly(options: Options, device: torch.device, precision: str) -> Step:
    from benchmarks.peers.lightly_dino import LightlyDino

    encoder, settings = _parts(options)
    sizes = [encoder.img_size] * settings.global_crops + [(settings.local_size,) * 2] * settings.local_crops
    model = LightlyDino(encoder.architecture, settings, options.drop_path).to(device).train()
    if options.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-4, betas=settings.betas, fused=True)
    images = tuple(torch.randn(options.batch_size, 3, *size, device=device) for size in sizes)
    dtype = AUTOCAST[precision]

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = model(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.follow(settings.teacher_momentum)

    return step


FORMS: dict[str, Make] = {
    OURS: _ours,
    USUAL: partial(_plain, padded=False),
    "padded": partial(_plain, padded=True),
    "lightly": _lightly,
}


def measure(options: Options) -> dict[str, Any]:
    """Time every form; returns the record. A peer that is not installed or fails says why under "left_out"."""
    wrong = [form for form in options.forms if form not in FORMS]
    if wrong:
        raise BadInput(f"--forms has no {wrong[0]!r}; choose from {', '.join(FORMS)}.")
    device, precision = rounds.machine(options)
    student, settings = _parts(options)
    with torch.device("meta"):
        flops = Dino(student.to("meta"), settings).flops_per_image()
    left_out: dict[str, str] = {}
    chosen = {form: FORMS[form] for form in options.forms or FORMS}
    if "lightly" in chosen and importlib.util.find_spec("lightly") is None:
        left_out["lightly"] = "it is not installed; the dependency group peers has it"
        del chosen["lightly"]
    candidates, first, memory, failed = rounds.prepared(chosen, options, device, precision, OURS, options.memory)
    record = rounds.in_turn(candidates, options, device, precision, flops, base=USUAL)
    record |= {"first_step_seconds": first, "left_out": left_out | failed}
    return record | ({"peak_memory": memory} if options.memory else {})


def show(record: dict[str, Any]) -> None:
    rounds.show(record, "dino, 2 large and 8 small crops:")
    for form, why in record["left_out"].items():
        print(f"{form} is left out: {why}.")


def main(arguments: Sequence[str] | None = None) -> int:
    return rounds.command(Options, measure, show, arguments, "benchmarks.multicrop")


if __name__ == "__main__":
    sys.exit(main())

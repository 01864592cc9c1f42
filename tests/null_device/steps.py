"""On the device that computes nothing: every stage of a method's published recipe, its whole step, as JSON.

    python -m tests.null_device.steps METHOD

Only a process in `device.environment` sees the device. Images are memory that nobody wrote; stages that store features first go
without, and a method that must see the data before its first step hasn't, which changes values and no count.
"""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from engine.model import recomputing, vit
from engine.training import config
from engine.training.calls import without_data
from engine.training.operations import CLASSES
from engine.training.stepping import made_ready, stepping
from tests.null_device.ledger import Report, examine

MODEL = "vit_tiny_patch16_224"
BATCH = 8
# bytes a thread that one of inductor's kernels spills and that were looked at: SimMIM's loss with the mask of its pixels
ACCEPTED_SPILLS = {"simmim": 288}  # 104 on sm_90


def flags_of(name: str) -> list[str]:
    """What is counted for every method."""
    return ["--method", name, "--model", MODEL, "--preset", "plain", "--batch-size", str(BATCH)]


def reports(flags: Sequence[str], compiles: bool) -> Iterator[tuple[str, Report]]:
    """Each stage of a run with these flags of `engine.train`, and how it runs."""
    plan = config.parse([*flags, "--device", "cuda"])
    torch.set_float32_matmul_precision("high")  # as training does
    torch.manual_seed(0)
    encoder = vit.create(plan.model, **plan.encoder)
    earlier = None
    for index, (kind, settings) in enumerate(plan.stages):
        method = without_data(kind, settings, encoder, CLASSES)
        if earlier is not None:
            method.inherit(earlier)
        earlier = method
        recomputing.choose(method, plan.train.recompute)
        step, _ = stepping(made_ready(method, compiles), index, plan.train.accumulate)
        yield f"{index} {kind}, {'compiled' if compiles else 'eager'}", examine(step, ACCEPTED_SPILLS.get(kind, 0))


if __name__ == "__main__":
    (name,) = sys.argv[1:]
    found = dict(reports(flags_of(name), False))
    gc.collect()
    torch.cuda.empty_cache()
    found |= reports(flags_of(name), True)
    print(json.dumps({stage: asdict(report) for stage, report in found.items()}))

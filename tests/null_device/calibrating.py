"""On the device that computes nothing: calibrate every candidate of what steps call of attention and of the losses, as JSON.
The environment names the file of `watched` as WATCHED.
"""

import json
import os
from pathlib import Path

import torch

from engine.training import config
from engine.training.calls import calls_of
from kernels.calibrate import measure, table
from kernels.calibration.calls import Call

METHODS = ("mae", "maect", "dino", "swav")  # attention; info_nce; soft_cross_entropy; sinkhorn
OPS = ("packed_attention", "info_nce", "soft_cross_entropy", "sinkhorn", "adamw")
BATCH = "8"


def calls() -> list[Call]:
    """One of each registered op, the smallest."""
    found: dict[str, Call] = {}
    for name in METHODS:
        flags = ["--method", name, "--model", "vit_tiny_patch16_224", "--preset", "plain", "--batch-size", BATCH]
        for call in calls_of(config.parse(flags), torch.device("cuda"), 1, "bf16"):
            if call.op in OPS and (call.name not in found or call.elements < found[call.name].elements):
                found[call.name] = call
    return list(found.values())


if __name__ == "__main__":
    wanted = calls()
    how = {"seconds": 1200.0, "prove_seconds": 300.0, "preload": ("tests.null_device.watched",), "say": lambda _: None}
    record = measure(wanted, torch.device("cuda", 0), compiles=True, **how)
    frozen, lines = table(wanted, [record], compiles=True)
    seen = [json.loads(line) for line in Path(os.environ["WATCHED"]).read_text().splitlines()]
    trials = {str(key).partition(" ")[0]: trial["forms"] for key, trial in record.trials.items()}
    found = {"seen": seen, "trials": trials, "frozen": frozen, "lines": lines, "record": str(record.path), "ops": OPS}
    print(json.dumps(found))

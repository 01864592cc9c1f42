"""On the device that computes nothing: a step counted for a plan, beside what the allocator says of another one.

python -m tests.null_device.counting METHOD MODEL BATCH on|off
"""

import json
import sys

import torch

from engine.planning.counting import WARM, counted
from engine.training import config
from engine.training.stepping import made_ready, method_of, stepping

if __name__ == "__main__":
    method, model, batch, compiles = sys.argv[1:]
    flags = ["--method", method, "--model", model, "--preset", "plain", "--batch-size", batch, "--device", "cuda"]
    torch.set_float32_matmul_precision("high")  # as training does
    step, update = stepping(made_ready(method_of(config.parse(flags), 0), compiles == "on"), logged=False)
    count = counted(step, update)
    torch.cuda.reset_peak_memory_stats()
    step(WARM + 2)
    allocator = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    found = {
        "count": count.as_json(),
        "allocator": allocator,
        "weights": sum(t.nbytes for t in (*update.method.parameters(), *update.method.buffers())),
        "trained": sum(p.nbytes for p in update.trained),
    }
    print(json.dumps(found))

"""On the device that computes nothing: one of two ranks that train together by DDP, compiled, as JSON.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python -m tests.null_device.ranks METHOD

Only a process in `device.environment` sees the device, and NCCL, which sends nothing. Both ranks take the device for their own.
Left out is what DDP reads from the device: that all have the same weights, and after the first step the order of its buckets.
"""

import json
import sys
from dataclasses import asdict
from functools import partial

import torch.distributed as td
from torch import nn

from engine.core import dist
from tests.null_device.steps import flags_of, reports

if __name__ == "__main__":
    (name,) = sys.argv[1:]
    ranks = dist.start("cuda")
    assert td.get_backend() == "nccl"
    nn.parallel.DistributedDataParallel = partial(nn.parallel.DistributedDataParallel, init_sync=False)
    td.Reducer._rebuild_buckets = lambda reducer: False
    found = {stage: asdict(report) for stage, report in reports(flags_of(name), True)}
    dist.stop()
    print(json.dumps({"rank": ranks.rank, "world": ranks.world, "stages": found}))

"""On the device that computes nothing: a whole run with the flags of `engine.train` but for what reads values, the probe and the
evaluation.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from engine.core import dist
from engine.training import config, run
from engine.training.parts import Parts, prepare
from engine.training.state import TrainState


def _no_probe(parts: Parts, state: TrainState, out: Path) -> Callable[[], dict[str, float]]:
    return lambda: {}


if __name__ == "__main__":
    run._probe = _no_probe
    plan = config.parse(sys.argv[1:])
    parts = prepare(plan, dist.start(plan.train.device))
    sys.exit(run.run(parts, lambda *_: {}))

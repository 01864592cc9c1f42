"""A run whose losses are kept: `engine.train` as it is, with an encoder of two blocks and without the evaluation at its end.

main(ARGUMENTS OF engine.train)      (in a process that tests.faults.server forks)
"""

from collections.abc import Sequence
from dataclasses import replace

from engine.core import dist
from engine.training import config
from engine.training.parts import prepare
from engine.training.run import run

DEPTH = 2


def main(arguments: Sequence[str]) -> int:
    """As `engine.train.main`; what it refuses is raised, as BadInput."""
    plan = config.parse(arguments)
    plan = replace(plan, encoder=plan.encoder | {"depth": DEPTH})
    return run(prepare(plan, dist.start(plan.train.device)), lambda *_: {})

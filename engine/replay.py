"""`python -m engine.replay RUN`: go back to an update that was left out because it was not finite, and say where that arose."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from engine.core import dist
from engine.core.commands import exit_status
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.training import config
from engine.training.parts import prepare
from engine.training.replay import left_out, replay


@dataclass(frozen=True)
class Replay:
    """Take a step of a run again, whose update was left out since loss or gradients were not finite, and say where that arose.

    It is reached from the checkpoint before it, as --resume does, and looked at uncompiled, module by module. Left behind is
    RUN/replay/step-N: what was found, and the batch. A run of several processes is replayed under torchrun with as many.
    """

    run: tyro.conf.Positional[str]
    """The run folder."""
    step: int = 0
    """The first one that was left out after so many steps; 0: the first of the run."""
    data: str = ""
    """Where the images are now, if they have moved."""
    device: str = ""
    """cpu or cuda; default: as the run."""


def run(flags: Replay) -> None:
    """Find the step, replay it, say what was found."""
    folder = Path(flags.run).expanduser()
    moved = [f"--{name}={value}" for name, value in (("data", flags.data), ("device", flags.device)) if value]
    plan = config.parse(["--resume", str(folder), *moved])
    if not (folder / "metrics.jsonl").is_file():
        raise BadInput(f"{folder} has no metrics.jsonl, which tells where updates were left out.")
    stretches = [stretch for stretch in left_out(folder) if stretch.last > flags.step]
    if not stretches:
        raise BadInput(f"{folder} left no update out" + (f" after step {flags.step:,}." if flags.step else "."))
    ranks = dist.start(plan.train.device)
    say = print if ranks.first else lambda *_: None
    stretch = stretches[0]
    say(f"updates were left out after step {stretch.before:,}, up to {stretch.last:,}, in stage {stretch.stage}")
    step, seen, where = replay(prepare(plan, ranks), folder, stretch, say)
    print(f"step {step:,}{f' (rank {ranks.rank})' if ranks.world > 1 else ''}: {seen}; {where}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return exit_status(
            lambda: run(read(Replay, given, prog="engine.replay", description=Replay.__doc__)), "nothing was written"
        )
    finally:
        dist.stop()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m engine.study NAME`: train a grid of pretext tasks, judge each alike, leave a table and a figure.

What that takes, and what is not done twice, is said in `engine.studies.conduct.run`.
"""

import shlex
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from engine import studies
from engine.core.commands import exit_status
from engine.studies import Study
from engine.studies.conduct.command_line import parse
from engine.studies.conduct.run import run


def main(arguments: Sequence[str] | None = None, find: Callable[[str], Study] = studies.get) -> int:
    """The command. Returns the exit status: as of `run`, or of `exit_status`."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def work() -> int:
        flags, study = parse(arguments, find)
        return run(flags, study, Console(), shlex.join(["python", "-m", "engine.study", *arguments]))

    return exit_status(work, "the same command goes on from what was saved")


if __name__ == "__main__":
    sys.exit(main())

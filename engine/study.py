"""`python -m engine.study NAME`: train a grid of pretext tasks, judge each alike, leave a table and a figure.

What that takes, and what is not done twice, is said in `engine.studies.conduct.run`.
"""

import shlex
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from engine import studies
from engine.core.errors import BadInput
from engine.studies import Study
from engine.studies.conduct.command_line import parse
from engine.studies.conduct.run import run


def main(arguments: Sequence[str] | None = None, find: Callable[[str], Study] = studies.get) -> int:
    """The command. Returns the exit status: as of `run`, 2 for input that cannot be used, 128 + the signal that ended it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        flags, study = parse(arguments, find)
        return run(flags, study, Console(), shlex.join(["python", "-m", "engine.study", *arguments]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("stopped at once; the same command goes on from what was saved", file=sys.stderr)
        return getattr(stopped, "status", 130)


if __name__ == "__main__":
    sys.exit(main())

"""What a command makes of its work: an exit status, and one sentence where it could not do it."""

import sys
from collections.abc import Callable

from engine.core.errors import BadInput
from engine.core.stopping import StopRequest


def exit_status(work: Callable[[], int | None], if_stopped: str) -> int:
    """The work's own status, or 0; 2 for input that cannot be used; 128 + the number of a signal that ended it.

    Args:
        work: prints what it finds.
        if_stopped: what stands then, printed after "stopped", unless the work has noted it at the KeyboardInterrupt.
    """
    try:
        with StopRequest():
            return work() or 0
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"stopped; {'; '.join(getattr(stopped, '__notes__', [if_stopped]))}", file=sys.stderr)
        return getattr(stopped, "status", 130)

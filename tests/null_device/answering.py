"""For test_forking.py: answers questions about itself, or fails as it is told to."""

import os
import signal
import sys
from typing import Any

from engine.null_device import forking

asked_before = 0


def answered(asked: dict[str, Any]) -> dict[str, Any]:
    global asked_before
    asked_before += 1
    print("said on the way")
    if "raise" in asked:
        raise ValueError(asked["raise"])
    if "die" in asked:
        os.kill(os.getpid(), signal.SIGKILL)
    if "end" in asked:
        os.kill(os.getppid(), signal.SIGKILL)
    return asked | {"before": asked_before - 1, "worker": os.getppid(), "chip": os.environ.get("NULLCUDA_SM")}


if __name__ == "__main__":
    sys.exit(forking.serve(answered))

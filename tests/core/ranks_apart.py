"""One of two ranks, with heartbeats ten times a second: PART is what becomes of rank 1 or of the launcher."""

import os
import signal
import sys
import time

from engine.core import dist, heartbeat
from engine.core.stopping import Interrupted, StopRequest


def say(words: str) -> None:
    """A line in one piece: ranks share the pipe, and torchrun has their output unbuffered."""
    os.write(1, f"{words}\n".encode())


if __name__ == "__main__":
    (part,) = sys.argv[1:]
    heartbeat.BEAT, heartbeat.SILENCE = 0.1, 2.0
    ranks = dist.start("cpu")
    say(f"rank {ranks.rank} is process {os.getpid()}")
    if part == "works":  # longer than the silence that is allowed: it is heard all the same
        time.sleep(3 * (1 - ranks.rank))
        dist.barrier()
        say(f"rank {ranks.rank} met the other")
    elif part == "waits":
        with StopRequest():
            try:
                dist.barrier() if ranks.rank else time.sleep(60)
            except Interrupted:
                say(f"rank {ranks.rank} was asked to stop")
                os._exit(0)
    else:
        if ranks.rank:
            os.kill(os.getpid(), {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}[part])
        dist.barrier()
    dist.stop()

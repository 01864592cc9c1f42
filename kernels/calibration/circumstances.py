"""What a machine is like at the moment of a calibration: failures that come of it speak of no implementation, and no record keeps
them. A card whose memory another process holds would otherwise leave its owner on the reference for good.
"""

from dataclasses import dataclass

import torch

from kernels.guarded import Guard

FREE = 0.8  # of a card's memory, where nobody else computes on it; the parent has a part
REACH_SECONDS = 60.0  # in which the child has to reach the device
# a child that never came to what it was asked, and one that somebody ended: the kernel, for want of memory, or a user
_FROM_OUTSIDE = ("the child process did not start", "killed by signal SIGKILL", "killed by signal SIGTERM")


@dataclass(frozen=True)
class Circumstances:
    """What the child finds before it tries anything.

    Attributes:
        obstacle: why it cannot use the device now, in words; "" where it can.
        free, total: bytes of the device's memory; of a CPU 0.
    """

    obstacle: str = ""
    free: int = 0
    total: int = 0

    @property
    def crowded(self) -> bool:
        """Whether so much memory is taken that what runs out of it may not do so another time."""
        return self.free < FREE * self.total

    def passes(self, failure: str) -> bool:
        """Whether a failure may be of this moment alone."""
        of_memory = "OutOfMemoryError" in failure or "out of memory" in failure
        return failure.startswith(_FROM_OUTSIDE) or (of_memory and self.crowded)


def look(guard: Guard, device: torch.device) -> Circumstances:
    """Asked of the guard's child."""
    outcome = guard.run(f"{__name__}:memory", {"device": str(device)}, REACH_SECONDS)
    if outcome.failure:
        return Circumstances(f"a second process cannot use {device} ({outcome.failure})")
    return Circumstances("", *outcome.value)


def memory(device: str) -> tuple[int, int]:
    """In the child: free bytes of the device and all of them. Fails where a card takes one process only, or none more."""
    at = torch.device(device)
    if at.type != "cuda":
        return 0, 0
    torch.cuda.set_device(at)
    torch.zeros(1, device=at)
    return torch.cuda.mem_get_info(at)

"""What an op must move and compute: the floor that its measured time is held against."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes that must cross the memory bus at least once, and floating-point operations that must be done."""

    bytes: int
    flops: int

    def floor_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The roofline: no implementation is faster than this on a device with these two peaks."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)

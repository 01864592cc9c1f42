"""What of a stage's time its steps wait for images, and what may be done about it.

On a CPU that is the time until the loader gives the next batch. A GPU works on what was launched before while the host waits,
so there the host's time says nothing: two events are recorded in the stream of the steps, when the host asks for a batch and
when it has it, and what lies between them is the time in which the device had nothing to do. The first one is reached when all
that was launched before is done, the second right after it if the batch was there by then. Nothing waits for them: they are read
where the loop has waited for the device anyway. What decoding on the GPU takes from steps that run beside it isn't seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

import torch

from engine.data.batch import Batch

LOADER_BOUND = 0.05  # share of the time from which it is told
LARGE = 2  # stored short side over the crop's, from which smaller files are advised


class Waits:
    """Fetches batches, and knows how long this process's steps waited for them. The first one, for which a loader is built and
    code compiled, isn't counted.

    Args:
        device: which computes the steps.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._first = True
        self._marks: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. Raises what the loader raises."""
        asked = self._mark()
        batch = next(batches)
        if not self._first:
            self._marks.append((asked, self._mark()))
        self._first = False
        return batch

    def seconds(self) -> float:
        """Waited since the last call. On a GPU the host must have waited for the device after the last `fetch`."""
        marks, self._marks = self._marks, []
        if self._device.type == "cuda":
            return sum(asked.elapsed_time(given) for asked, given in marks) / 1e3
        return sum(given - asked for asked, given in marks)

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


@dataclass(frozen=True)
class Feed:
    """What feeds the steps of a process.

    Attributes:
        threads: of the loader.
        cores: that this process may count as its own.
        short_side: median of the stored images' shorter sides, in pixels; 0 where there are no files.
        crop: shorter side of the largest view, in pixels; 0 where there are no views.
    """

    threads: int
    cores: int
    short_side: int
    crop: int

    def advice(self) -> str:
        """What to try, in this order."""
        found = []
        if self.threads < self.cores:
            found.append(
                f"--threads {self.cores} ({self.threads} of this process's {self.cores} cores make images now)"
            )
        if self.crop and self.short_side > LARGE * self.crop:
            found.append(
                f"smaller files (their short side is {self.short_side:,} pixels, that of a crop {self.crop}: python -m "
                f"engine.shard DIR OUT --short {LARGE * self.crop})"
            )
        if self.threads >= self.cores:
            words = "its one core makes" if self.cores == 1 else f"all its {self.cores} cores make"
            found.append(f"more cores for each process ({words} images already)")
        return "; then ".join(found)


def verdict(share: float, feed: Feed) -> str:
    """In a sentence, whether a stage waits for images; "" where that is not worth saying.

    Args:
        share: of the time, 0 to 1.
    """
    if share < LOADER_BOUND:
        return ""
    return f"loader-bound: {share:.0%} of the time waiting for data; try {feed.advice()}"

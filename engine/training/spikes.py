"""When a loss has risen far above what it was: the rule by which --rewind goes back to the last good checkpoint.

After what PaLM's authors did by hand (arXiv 2204.02311, section 5.1): weights from before the spike, and on behind the batches
that led to it. When that is to happen is a rule of ours, on logged losses.
"""

import math
from dataclasses import dataclass, field
from statistics import median

WINDOW, LEAST = 50, 10  # logged losses that are remembered, and those that it takes to judge the next one
FAR = 10.0  # standard deviations above the median
SMALLEST = 0.01  # of the median, taken for the deviation of a loss that hardly moves
IN_A_ROW = 3  # logged losses that must be far up: a single one is an odd batch


@dataclass
class Spikes:
    """What is remembered of a stage's loss, in a checkpoint too.

    Attributes:
        losses: logged, not far up, the newest last.
        above: logged since, all far up.
        rewound: how often the stage went back.
    """

    losses: list[float] = field(default_factory=list)
    above: int = 0
    rewound: int = 0

    @property
    def usual(self) -> float:
        """The median of what is remembered; not a number where nothing is."""
        return median(self.losses) if self.losses else math.nan

    def note(self, loss: float) -> bool:
        """Whether this loss, the next one logged, makes a spike of those far up."""
        if self._far_up(loss):
            self.above += 1
            return self.above >= IN_A_ROW
        self.above = 0
        self.losses = [*self.losses, loss][-WINDOW:]
        return False

    def _far_up(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self.losses) < LEAST:
            return False
        usual = self.usual
        # of normally distributed losses the standard deviation is 1.4826 of the median distance from the median
        deviation = 1.4826 * median(abs(other - usual) for other in self.losses)
        return loss > usual + FAR * max(deviation, SMALLEST * abs(usual))

"""Differences between the first weights and each of the others, with what is known about how sure they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.evals.result import Result, difference

SAMPLES, SEEDS = "samples", "seeds"
NOTE = (
    "Differences to {first}, of percentages in points. A bracket is a 95 % paired bootstrap interval over the n samples (test "
    "images or objects) that both were judged on: what other test samples might have shown, not what other training runs might. "
    "An arrow marks an interval that excludes 0; of twenty intervals of equal weights, one does so by chance. Without samples, "
    "± is the deviation of the difference over seeds, or there is no interval."
)


@dataclass(frozen=True)
class Compared:
    """How one figure of some weights differs from that of the first weights.

    Args:
        mean: theirs minus the first's.
        over: what was paired: "samples", "seeds", or "" for nothing, then no more is known than two numbers.
        count: of samples or seeds that were paired.
        interval: 95 % paired bootstrap interval over samples.
        spread: deviation of the difference over seeds.
        plain: the figure is no fraction.
        lower: of the figure, less is better.
    """

    protocol: str
    figure: str
    weights: str
    mean: float
    over: str = ""
    count: int = 0
    interval: tuple[float, float] | None = None
    spread: float | None = None
    plain: bool = False
    lower: bool = False

    @property
    def sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def better(self) -> bool:
        """Whether these weights are better than the first."""
        return (self.mean < 0) if self.lower else (self.mean > 0)


def compared(results: Sequence[Result], headline: bool = True) -> list[Compared]:
    """Of every protocol and figure (those of the summary only, unless told otherwise), each other weights against the first.

    Figures that are not finite for both are left out.
    """
    first = {result.protocol: result for result in results if result.weights == results[0].weights}
    found = []
    for result in results:
        base = first.get(result.protocol)
        if base is None or base.weights == result.weights:
            continue
        for name in result.shown if headline else result.values:
            known = result.values[name], base.values.get(name, np.nan)
            if not name.endswith(" std") and np.isfinite(known).all():
                found.append(_compare(name, base, result))
    order = list(dict.fromkeys((each.protocol, each.figure) for each in found))
    return sorted(found, key=lambda each: order.index((each.protocol, each.figure)))


def _compare(name: str, base: Result, other: Result) -> Compared:
    about = {"protocol": other.protocol, "figure": name, "weights": other.weights}
    about |= {"plain": name in other.plain, "lower": name in other.lower}
    samples = base.samples.get(name, np.empty(0)), other.samples.get(name, np.empty(0))
    if len(samples[0]) == len(samples[1]) and np.isfinite(samples[0] + samples[1]).any():
        paired = difference(*samples)
        return Compared(**about, mean=paired.mean, over=SAMPLES, count=paired.count, interval=paired.interval)
    runs = [result.details.get("by seed", {}) for result in (base, other)]
    common = [seed for seed in runs[0] if seed in runs[1]]
    if len(common) > 1:
        differences = np.array([runs[1][seed][name] - runs[0][seed][name] for seed in common])
        about |= {"over": SEEDS, "count": len(common), "spread": float(differences.std())}
        return Compared(**about, mean=float(differences.mean()))
    return Compared(**about, mean=other.values[name] - base.values[name])

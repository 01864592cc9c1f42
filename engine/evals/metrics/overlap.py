"""How far two sets of scores lie apart: the overlap of their histograms, AUROC, d', the equal-error threshold, average precision.

Shapes: n scores of one set.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

BIN = 0.02  # of cosines; [-1, 1] has a hundred


@dataclass(frozen=True, eq=False)
class Scores:
    """A set of scores.

    Args:
        values: float [n].
        weights: float [n], positive; equal ones when left out.

    Raises:
        ValueError: no score, another number of weights, or a score that is not finite.
    """

    values: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self):
        if self.values.ndim != 1 or not len(self.values) or not np.isfinite(self.values).all():
            raise ValueError("scores must be one or more finite numbers, [n]")
        if self.weights is not None and self.weights.shape != self.values.shape:
            raise ValueError(f"{len(self.values)} scores have {len(self.weights)} weights")

    @property
    def shares(self) -> np.ndarray:
        """float64 [n], the weights, with sum 1."""
        if self.weights is None:
            return np.full(len(self.values), 1 / len(self.values))
        return self.weights / self.total

    @property
    def total(self) -> float:
        """The sum of the weights."""
        return float(len(self.values) if self.weights is None else self.weights.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        first = self.values[0]  # taken off, so that rounding gives equal scores no spread
        return float(first + np.average(self.values - first, weights=self.weights))

    @property
    def variance(self) -> float:
        """Of the whole set: divided by n, not by n - 1."""
        return float(np.average((self.values - self.mean) ** 2, weights=self.weights))


def histogram(scores: Scores, width: float = BIN) -> np.ndarray:
    """float64 [2 / width]: the share of cosines in each bin from -1 to 1, which includes its lower edge, the last both.

    What rounding put beyond -1 or 1 is counted there.
    """
    clipped = scores.values.clip(-1, 1)
    return np.histogram(clipped, round(2 / width), (-1, 1), weights=scores.shares)[0]


def overlap(one: Scores, other: Scores, width: float = BIN) -> float:
    """The area that two histograms of cosines share: 0 for sets that lie apart, 1 for equal ones."""
    return float(np.minimum(histogram(one, width), histogram(other, width)).sum())


def auroc(high: Scores, low: Scores) -> float:
    """The probability that a score of `high` is above one of `low`; equal ones count half."""
    beaten, not_above = (_below(low, high.values, side) for side in ("left", "right"))
    return float(np.average(beaten + not_above, weights=high.weights)) / 2


def average_precision(high: Scores, low: Scores) -> float:
    """Precision, weighted by the recall gained, over falling thresholds; equal scores are gained at once. No interpolation."""
    found, wrong = (each.total * (1 - _below(each, high.values, "left")) for each in (high, low))
    return float(np.average(found / (found + wrong), weights=high.weights))


def d_prime(high: Scores, low: Scores) -> float:
    """Difference of means over the root of the mean variance; 0 where the means are equal, infinite where nothing varies."""
    apart, spread = high.mean - low.mean, math.sqrt((high.variance + low.variance) / 2)
    return apart / spread if spread else math.copysign(math.inf, apart) if apart else 0.0


def equal_error(high: Scores, low: Scores) -> tuple[float, float]:
    """Where as large a share of `low` is at or above a threshold as of `high` is below it.

    Thresholds half-way between neighbouring scores, the lowest score, and one above all are compared; the first of the best is
    taken, from high to low.

    Returns:
        the threshold, and the mean of the two shares there.
    """
    values = np.unique(np.concatenate([high.values, low.values]))[::-1]
    between = np.append((values[:-1] + values[1:]) / 2, values[-1])
    thresholds = np.append(np.nextafter(values[0], np.inf), between)
    missed, taken = _below(high, thresholds, "left"), 1 - _below(low, thresholds, "left")
    best = int(np.abs(missed - taken).round(12).argmin())
    return float(thresholds[best]), float((missed[best] + taken[best]) / 2)


def _below(scores: Scores, values: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
    """float64, shaped as `values`: the share of scores below each of them, or with "right" not above."""
    if scores.weights is None:
        return np.searchsorted(np.sort(scores.values), values, side) / len(scores.values)
    order = np.argsort(scores.values)
    shares_below = np.append(0.0, np.cumsum(scores.shares[order])).clip(max=1.0)
    shares_below[-1] = 1.0
    return shares_below[np.searchsorted(scores.values[order], values, side)]

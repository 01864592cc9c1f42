"""What one protocol found about one set of weights, and how several findings of it become one.

Shapes: m samples that a figure is the mean over, such as test images or objects.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.core.plotting import Figure

BEST_EPOCH, LAST_EPOCH = "best-epoch", "last-epoch"
_DRAWS = 2000
_AT_ONCE = 4_000_000  # drawn places held in memory


@dataclass(frozen=True, eq=False)
class Result:
    """What one protocol found.

    Args:
        protocol: its name, the stem of its file.
        values: figures by name; fractions of one unless listed in `plain`. "X std" is the spread of "X".
        settings: everything that was chosen, JSON-able.
        details: more of it (JSON-able), and numpy arrays (kept out of results.json). A list of dicts is a table that the
            command prints: its first column and whole numbers as they are, fractions in percent, columns of `plain` as they are.
        headline: the values a summary shows; empty for all.
        plain: values that are no fractions, shown as they are.
        lower: values of which less is better.
        spread: what "X std" is the deviation over, in words.
        samples: by figure, float64 [m] whose mean is the figure: what each test image or object adds to it. Equal places mean
            equal samples for all weights, so that differences between weights can be paired. NaN where one does not count.
        pictures: by title, what people would rather look at.
        counts: by name, how many images, objects, patches were used, and how many were left out.
        weights: whose features were judged.
        feature: which of their outputs was used, in words.
        data: the set, in words.
        seconds: time the protocol took, without extraction.

    Raises:
        ValueError: a best-epoch figure has no last-epoch one beside it.
    """

    protocol: str
    values: dict[str, float]
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    plain: frozenset[str] = frozenset()
    lower: frozenset[str] = frozenset()
    spread: str = ""
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    weights: str = ""
    feature: str = ""
    data: str = ""
    seconds: float = 0.0

    def __post_init__(self):
        lonely = [name for name in self.values if BEST_EPOCH in name and not self.partners(name.removesuffix(" std"))]
        if lonely:
            raise ValueError(
                f"{self.protocol} gives {lonely[0]!r} without the {LAST_EPOCH} figure that belongs beside it."
            )

    def partners(self, name: str) -> list[str]:
        """The last-epoch figures that a best-epoch one is never shown without; none for other figures."""
        if BEST_EPOCH not in name:
            return []
        last = name.replace(BEST_EPOCH, LAST_EPOCH).partition(" (")[0]
        return [other for other in self.values if other.startswith(last) and not other.endswith(" std")]

    @property
    def shown(self) -> tuple[str, ...]:
        """The headline, or all figures where there is none, completed by the partners of best-epoch figures; no spreads."""
        named = {name for each in self.headline or self.values for name in (each, *self.partners(each))}
        return tuple(name for name in self.values if name in named and not name.endswith(" std"))


def as_chosen(names: Iterable[str]) -> str:
    """What follows the source of a recipe in a result's settings where its numbers of these names were replaced; or nothing."""
    said = ", ".join(names).replace("_", " ")
    return f"; {said} as chosen" if said else ""


@dataclass(frozen=True)
class Difference:
    """Between two sets of weights, of one figure.

    Args:
        mean: of the second minus the first.
        interval: 95 % bootstrap interval; None where `interval` has none.
        count: samples that were paired.
    """

    mean: float
    interval: tuple[float, float] | None
    count: int


def interval(samples_m: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of samples, float [m]: the bootstrap percentile interval (Efron and Tibshirani 1993, chapter 13).

    2,000 times m samples are drawn with replacement, from a fixed seed. NaN is left out. Of samples that are all alike, or
    fewer than two, there is no interval: nothing is known about others.
    """
    counted_m = np.asarray(samples_m, np.float64)
    counted_m = counted_m[~np.isnan(counted_m)]
    if len(counted_m) < 2 or np.ptp(counted_m) == 0:
        return None
    rng, at_once = np.random.default_rng(0), max(1, _AT_ONCE // len(counted_m))
    means = [
        counted_m[
            rng.integers(len(counted_m), size=(min(at_once, _DRAWS - start), len(counted_m)), dtype=np.int32)
        ].mean(1)
        for start in range(0, _DRAWS, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def difference(first_m: np.ndarray, second_m: np.ndarray) -> Difference:
    """The second minus the first, place by place, both float [m]; places where either is NaN are left out.

    Raises:
        ValueError: the lengths differ, or nothing is left.
    """
    if len(first_m) != len(second_m):
        raise ValueError(f"{len(first_m)} and {len(second_m)} samples cannot be paired.")
    paired_m = np.asarray(second_m, np.float64) - np.asarray(first_m, np.float64)
    paired_m = paired_m[~np.isnan(paired_m)]
    if not len(paired_m):
        raise ValueError("no sample counts for both.")
    return Difference(float(paired_m.mean()), interval(paired_m), len(paired_m))


def over_seeds(results: Sequence[Result], seeds: Sequence[int]) -> Result:
    """One result from those of several seeds, alike in all else: means, "X std" the deviation over seeds.

    Where a figure has a spread of its own (over splits), the two variances are added. Samples are averaged; pictures and other
    details are those of the first seed, and details["by seed"] has the figures of each.
    """
    first = results[0]
    values = {}
    for name in first.values:
        if name.endswith(" std"):
            continue
        runs = np.array([result.values[name] for result in results])
        within = np.array([result.values.get(f"{name} std", 0.0) for result in results])
        values |= {name: float(runs.mean()), f"{name} std": float(np.sqrt(runs.var() + np.square(within).mean()))}
    by_seed = {str(seed): result.values for seed, result in zip(seeds, results, strict=True)}
    return replace(
        first,
        values=values,
        settings=first.settings | {"seeds": list(seeds)},
        details=first.details | {"by seed": by_seed},
        plain=first.plain | {f"{name} std" for name in first.plain},
        spread=" and ".join(filter(None, (f"{len(results)} seeds", first.spread))),
        samples={name: np.mean([result.samples[name] for result in results], 0) for name in first.samples},
        seconds=sum(result.seconds for result in results),
    )

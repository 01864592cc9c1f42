"""What one protocol found about one set of weights, and how several findings of it become one.

Shapes: m samples that a figure is the mean over, such as test images or objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Result:
    """What one protocol found.

    Args:
        protocol: its name, the stem of its file.
        values: figures by name; fractions of one unless listed in `plain`. "X std" is the spread of "X".
        settings: everything that was chosen, JSON-able.
        details: more of it (JSON-able), and numpy arrays for pictures (kept out of results.json). A list of dicts is a
            table that the command prints: its first column and whole numbers as they are, fractions in percent.
        headline: the values a summary shows; empty for all.
        plain: values that are no fractions, shown as they are.
        samples: by figure, float64 [m] whose mean is the figure: what each test image or object adds to it. Equal places mean
            equal samples for all weights, so that differences between weights can be paired. NaN where one does not count.
        pictures: by title, what people would rather look at.
        counts: by name, how many images, objects, patches were used, and how many were left out.
        weights: whose features were judged.
        feature: which of their outputs was used, in words.
        data: the set, in words.
        seconds: time the protocol took, without extraction.
    """

    protocol: str
    values: dict[str, float]
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    plain: frozenset[str] = frozenset()
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    weights: str = ""
    feature: str = ""
    data: str = ""
    seconds: float = 0.0


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
        samples={name: np.mean([result.samples[name] for result in results], 0) for name in first.samples},
        seconds=sum(result.seconds for result in results),
    )

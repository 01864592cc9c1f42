"""The small parts of a training set that low-shot protocols learn from: what may be asked for, and shares drawn at random."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.core.errors import BadInput


def check(protocol: str, settings: Any, counts: str = "shots") -> None:
    """Raise BadInput for subsets that cannot be meant: sizes below 1, shares outside 0 to 100 %, seeds that repeat, or none.

    Args:
        settings: with percents and files, and maybe with draws, the seeds.
        counts: which field has the sizes.
    """
    sizes = getattr(settings, counts)
    if not (sizes or settings.percents or settings.files):
        raise BadInput(f"{protocol} needs {counts}, percents or files; all are empty.")
    if not all(size >= 1 for size in sizes):
        raise BadInput(f"{protocol} {counts} = {sizes} must be whole numbers of at least 1.")
    if not all(0 < percent <= 100 for percent in settings.percents):
        raise BadInput(f"{protocol} percents = {settings.percents} must be above 0 and at most 100.")
    seeds = getattr(settings, "draws", (0,))
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise BadInput(f"{protocol} draws = {seeds} must be one or more different seeds from 0.")


def at_random(images: int, percents: Sequence[float], seeds: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """By its name, such as "10%", each share of so many images: their rows, rising, for each seed; at least one image."""
    return {
        f"{percent:g}%": [
            np.sort(np.random.RandomState(seed).permutation(images)[: max(1, round(images * percent / 100))])
            for seed in seeds
        ]
        for percent in percents
    }

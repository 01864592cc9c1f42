"""A fixed few images of a set whose images show several classes, drawn so that each class is shown often enough.

Shapes: n images, K classes.
"""

from collections.abc import Sequence

import numpy as np

from engine.core.errors import BadInput


def few_positives(targets_nK: np.ndarray, k: int, seed: int, classes: Sequence[str] | None = None) -> np.ndarray:
    """Images that show every class at least `k` times, drawn greedily (a proposal: no published rule was found).

    All images are gone through once, in a random order; one is taken if it shows a class that those taken before show less
    than `k` times. So of one seed, the images for a smaller `k` are among those for a larger one.

    Args:
        targets_nK: int8, 1 where the image shows the class; what is 0 or -1 (not to be counted) is no positive.
        k: at least 1.
        classes: K names for messages.

    Returns:
        int64 ids, ascending: a pure function of targets, k and seed, for good.

    Raises:
        BadInput: a class has less than `k` positives in all.
    """
    shows_nK = np.asarray(targets_nK) == 1
    few = np.flatnonzero(shows_nK.sum(0) < k)
    if len(few):
        name, there = classes[few[0]] if classes else few[0], int(shows_nK[:, few[0]].sum())
        raise BadInput(
            f"class {name} is shown by {there} of {len(shows_nK)} images, which is less than {k}; choose a smaller number."
        )
    # RandomState, whose stream numpy has frozen: the draws stay the same for good
    order = np.random.RandomState(seed).permutation(len(shows_nK))
    shown_nK = shows_nK[order]
    # as long as a class is shown too rarely, every image that shows it is taken: so those are its first k ones
    return np.sort(order[(shown_nK & (shown_nK.cumsum(0) <= k)).any(1)]).astype(np.int64)
